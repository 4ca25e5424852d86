"""Every kind of file that sequence comes from: the same bases out of each, and one line on each that is damaged."""

import builtins
import gzip
import json
import struct

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.cli.verify import main as verify_command
from hyena_dist.data import blocks
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.sources import read_contigs
from tests.genomes import bgzip, fasta_text, genome
from tests.sequence_files import genbank, json_lines, parquet, two_bit

CONTIGS = genome(5, 1, 59, 60, 61, 4000, 121)
ONLY_N = {name: bases.translate(bytes.maketrans(b"URYSWKMBDHVuryswkmbdhv", b"N" * 11 + b"n" * 11))
          for name, bases in CONTIGS.items()}
WRITERS = {
    "FASTA": lambda path: fasta_text(CONTIGS),
    "GenBank": lambda path: genbank(CONTIGS),
    "JSON lines": lambda path: json_lines(CONTIGS),
    "parquet": lambda path: parquet(CONTIGS, path),
    "2bit": lambda path: two_bit(ONLY_N),
    "2bit of the other order": lambda path: two_bit(ONLY_N, ">"),
    "2bit of long offsets": lambda path: two_bit(ONLY_N, version=1),
}


def read(path, label=""):
    return {contig.name: contig.bases.tobytes() for contig in read_contigs([Source(path, label)])}


def expected(kind):
    """GenBank writes everything in lower case: a record of one case is read in upper case."""
    contigs = ONLY_N if kind.startswith("2bit") else CONTIGS
    if kind == "GenBank":
        return {name: bases.upper() if bases.islower() else bases for name, bases in contigs.items()}
    return contigs


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_base_comes_back_from_every_kind_of_file(tmp_path, monkeypatch, kind, pack):
    """Whatever its name, and however its bytes fall into blocks."""
    path = tmp_path / "name_says_nothing"
    path.write_bytes(pack(WRITERS[kind](path)))
    if pack is not bytes and kind.split()[0] in ("2bit", "parquet"):
        with pytest.raises(DataError, match=f"^{path}: cannot be read inside gzip; unpack it with `gunzip`"):
            read(path)
        return
    for size in (1 << 24, 61):
        monkeypatch.setattr(blocks, "_BLOCK", size)
        assert read(path) == expected(kind)
    assert [*read(path, "mouse")] == [f"mouse.{name}" for name in CONTIGS]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_build_of_every_kind_is_verified_against_its_file(tmp_path, capsys, kind):
    """The control: one base of the file altered."""
    path, other, out = tmp_path / "genome", tmp_path / "other", tmp_path / "out"
    path.write_bytes(WRITERS[kind](path))
    assert build_command([f"yeast={path}", "--out", str(out)]) == 0
    assert verify_command([str(out), "--fasta", f"yeast={path}"]) == 0
    manifest = Manifest.load(out)
    whole = b"".join(manifest.read_sample(number).tobytes() for number in range(len(manifest.index.samples)))
    assert whole == b"".join(expected(kind).values())
    altered = {**expected("2bit"), "chr5": expected("2bit")["chr5"][:-1] + b"C"}
    assert altered["chr5"] != expected(kind)["chr5"]
    other.write_bytes(two_bit(altered))
    capsys.readouterr()
    assert verify_command([str(out), "--fasta", f"yeast={other}"]) == 2
    assert "differs from" in capsys.readouterr().err


def test_progress_adds_up_to_the_file(tmp_path):
    for kind, write in WRITERS.items():
        path = tmp_path / "file"
        path.write_bytes(write(path))
        counts = []
        list(read_contigs([Source(path)], counts.append))
        assert sum(counts) == path.stat().st_size, kind


def test_sequences_without_a_name_are_called_after_their_place(tmp_path):
    path = tmp_path / "my genes.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "ACGT"}\n\n{"text": "GG", "id": 7}\n'
                                   b'{"sequence": "acgn", "record": null}\n'
                                   b'{"text": "T", "record": "NC_1.1 Homo sapiens"}'))
    assert read(path) == {"my_genes.1": b"ACGT", "7": b"GG", "my_genes.4": b"acgn", "NC_1.1": b"T"}


def test_upper_case_genbank_of_one_case_and_of_both(tmp_path):
    path = tmp_path / "a.gb"
    path.write_bytes(genbank({"low.1": b"acgtn" * 20, "both.1": b"acgtN" * 20, "up.1": b"ACGTN" * 20}))
    assert read(path) == {"low.1": b"ACGTN" * 20, "both.1": b"acgtN" * 20, "up.1": b"ACGTN" * 20}


GENBANK = genbank({"a.1": b"acgt" * 40})
TWO_BIT = two_bit({"a": b"ACGTNNacgtACGT" * 30})
BAD = {
    "GenBank cut short in its sequence": (GENBANK[:-70], "ends inside record 'a.1'; it is cut short"),
    "GenBank without its end": (GENBANK[:-3], "ends inside record 'a.1'; it is cut short"),
    "GenBank that lost a line": (GENBANK.replace(b"\n       61 acgt", b"\n      XX acgt"),
                                 "line 10: is not the line of sequence that begins with base 61 of 'a.1'"),
    "GenBank of another length": (GENBANK.replace(b"160 bp", b"161 bp"), "has 160 bases, its LOCUS says 161"),
    "GenBank of protein": (GENBANK.replace(b" bp ", b" aa "), "line 1: is a record of protein; give nucleotides"),
    "GenBank without sequence": (GENBANK[: GENBANK.index(b"ORIGIN")] + b"CONTIG      join(X:1..9)\n//\n",
                                 "record 'a.1' holds no sequence; get the file with it"),
    "GenBank with a gap": (GENBANK.replace(b"acgtacgtac gtac", b"acgtacgtac gt-c", 1), "byte b'-' at base 13 is not"),
    "GenBank begun twice": (GENBANK[: GENBANK.index(b"ORIGIN")] + GENBANK, "a record begins inside that of 'a.1'"),
    "GenBank of no record": (b"LOCUS       nothing\n", "line 1: does not begin a record"),
    "2bit cut short": (TWO_BIT[:-1], "the 2bit file is cut short"),
    "2bit cut in its header": (TWO_BIT[:10], "the 2bit file is cut short"),
    "2bit cut in its index": (TWO_BIT[:19], "the 2bit file is cut short"),
    "2bit of another version": (TWO_BIT[:4] + struct.pack("<I", 2) + TWO_BIT[8:], "says version 2"),
    "2bit of nothing": (struct.pack("<4I", 0x1A412743, 0, 0, 0), "holds no sequence"),
    "2bit with an offset outside": (TWO_BIT[:18] + b"\xff\xff\xff\x7f" + TWO_BIT[22:], "begins at byte 2,147,483,647"),
    "2bit whose N leave it": (TWO_BIT[:26] + struct.pack("<I", 1 << 29) + TWO_BIT[30:], "is cut short"),
    "2bit whose masks leave it": (two_bit({"a": b"ACgt"}).replace(struct.pack("<II", 2, 2), struct.pack("<II", 3, 2)),
                                  "mask blocks of 'a' overlap or leave their sequence of 4 bases"),
    "JSON cut short": (b'{"text": "ACG', "line 1: is not JSON"),
    "JSON nested deeply": (b'{"text":' + b"[" * 100_000, "line 1: is not JSON"),
    "JSON of a list": (b'{"text": "A"}\n["A"]\n', "line 2: is no object"),
    "JSON without text": (b'{"dna": "A"}\n', "line 1: has no text under 'text' or 'sequence'"),
    "JSON with a number as text": (b'{"text": 1}\n', "line 1: has no text under"),
    "JSON with tags": (b'{"text": "|d__BACTERIA|ACGT"}', r"'bad.1': byte b'\|' at base 1 is not an IUPAC code"),
    "JSON with half a character": (b'{"text": "\\ud800"}', "is no character"),
    "JSON with an empty text": (b'{"text": ""}', "has no sequence"),
    "JSON with an empty name": (b'{"text": "A", "record": " "}', "'record' is no name"),
    "JSON with a name that cannot be seen": (b'{"text": "A", "record": "a\\u0000b"}', "is not a character"),
    "JSON twice": (b'{"text": "A", "record": "a"}\n' * 2, "contig 'a' comes twice"),
    "parquet cut short": (b"PAR1" + bytes(100), "is damaged|cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_damaged_files_end_in_one_line_that_names_the_place(tmp_path, content, message):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_parquet_of_other_columns_and_without_its_library(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"dna": ["ACGT"]}), path)
    with pytest.raises(DataError, match="has the columns dna; name the one of the sequence 'text' or 'sequence'"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": np.zeros(0, str).tolist()}), path)
    with pytest.raises(DataError, match="holds no rows"):
        read(path)
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"is read with pyarrow; install it with pip install 'hyena-dist\[tables\]'"):
        read(path)


def test_kinds_may_be_mixed_in_one_build(tmp_path):
    one, two = tmp_path / "a.gb", tmp_path / "b.jsonl"
    one.write_bytes(genbank({"x.1": b"acgt" * 9}))
    two.write_text(json.dumps({"text": "GGCC", "record": "y"}))
    assert build_command([str(one), f"mouse={two}", "--out", str(tmp_path / "out")]) == 0
    assert [tuple(info) for info in Manifest.load(tmp_path / "out").contigs] == [
        ("x.1", 36, "a", "a"), ("mouse.y", 4, "b", "mouse")]
