import gzip
import os

import pytest

from hyena_dist.data import fasta
from hyena_dist.data.build import build
from hyena_dist.data.errors import DataError
from hyena_dist.data.fasta import Source, read_contigs
from hyena_dist.data.splits import Splits
from hyena_dist.data.verify import records, verify
from tests.genomes import bgzip, fasta_text, genome


def read(*paths, label=""):
    return {contig.name: contig.bases.tobytes() for contig in read_contigs([Source(path, label) for path in paths])}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("block", [1, 7, 61, 1 << 20])
def test_every_byte_comes_back(tmp_path, monkeypatch, pack, line_end, block):
    contigs = genome(block, 1, 59, 60, 61, 3000)
    path = tmp_path / "name_says_nothing"
    path.write_bytes(pack(fasta_text(contigs, line_end=line_end)))
    monkeypatch.setattr(fasta, "_BLOCK", block)
    assert read(path) == contigs


MIXED = {
    "a CR file with LF behind": (b">mito d\rACGTACGTACGT\rGGGG\r>chr2\nTTTTTTTT\n",
                                 {"mito": b"ACGTACGTACGTGGGG", "chr2": b"TTTTTTTT"}),
    "a header edited on a Mac": (b">a\nAC\n>b words\rGGGG\nTT\n", {"a": b"AC", "b": b"GGGGTT"}),
    "each line its own": (b">a\r\nAC\rGT\nNN\r\n>b x\rTT\r\r\nA\r>c\n\rGG", {"a": b"ACGTNN", "b": b"TTA", "c": b"GG"}),
    "CR at the very end": (b">a\nACGT\r", {"a": b"ACGT"}),
    "LF CR": (b">a\n\rAC\n\rGT\n\r", {"a": b"ACGT"}),
}


@pytest.mark.parametrize(("text", "contigs"), MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_mixed_line_ends(tmp_path, monkeypatch, text, contigs, pack, block):
    path = tmp_path / "mixed.fa"
    path.write_bytes(pack(text))
    monkeypatch.setattr(fasta, "_BLOCK", block)
    assert read(path) == contigs
    again = {name: bases.tobytes() for name, bases in records(Source(path))}
    assert again == contigs, "the other reader, of verification"


def test_verification_reads_with_another_reader(tmp_path, monkeypatch):
    """Where the reader of builds loses a line, shards and FASTA differ. The control: read by itself it agrees."""
    path = tmp_path / "a.fa"
    path.write_bytes(b">a words\rGGGG\nACGT\n>b\nAC\n")
    monkeypatch.setattr(fasta, "_with_line_feeds", lambda blocks: (block.replace(b"\r", b"") for block in blocks))
    manifest = build([Source(path)], tmp_path / "out", Splits())
    assert read(path) == {"a": b"ACGT", "b": b"AC"}
    assert [info.bases for info in manifest.contigs] == [4, 2]
    with pytest.raises(DataError, match="contig 'a' of 8 bases is not in"):
        verify(manifest.directory, [Source(path)])


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.fa")
    with pytest.raises(DataError, match="a.fa: cannot be read .it is no regular file.; give .*, and write what comes"):
        read(tmp_path / "a.fa")


def test_titles_joined_by_ctrl_a_are_a_header(tmp_path):
    """As NCBI joins those of one sequence. The bases are those of the other reader too."""
    path = tmp_path / "nt.fa"
    path.write_bytes(b">chr1 foo\x01gi|2 bar\x01gi|3\nACGT\n>chr2\t\x01x\xff\nGG\n")
    assert read(path) == {"chr1": b"ACGT", "chr2": b"GG"}
    manifest = build([Source(path)], tmp_path / "out", Splits())
    verify(manifest.directory, [Source(path)])


def test_one_long_line_and_blank_lines_and_no_last_line_end(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b"\n>a\n" + b"ACGT" * 5000 + b"\n\n>b\n\nAC\n\nGT")
    assert read(path) == {"a": b"ACGT" * 5000, "b": b"ACGT"}


def test_label_goes_before_the_name(tmp_path):
    path = tmp_path / "a=b.fa"
    path.write_bytes(b">chr1\nACGT\n")
    assert list(read(path, label="mouse")) == ["mouse.chr1"]
    assert Source.parse(str(path)) == Source(path)
    assert Source.parse("mouse=mm10.fa").label == "mouse"


def test_progress_adds_up_to_the_file_size(tmp_path):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(fasta_text(genome(0, 5000))))
    counts = []
    list(read_contigs([Source(path)], counts.append))
    assert sum(counts) == path.stat().st_size


GOOD = b">a\nACGTACGT\nACGT\n"
TEXT = fasta_text(genome(1, 20000))
BAD = {
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "holds no sequence"),
    "only blank lines": (b"\n\n", "holds no sequence"),
    "no header": (b"ACGT\n", "line 1: does not start with a '>' header"),
    "binary": (bytes(range(256)) * 10, "byte 0x00 before the first '>' header"),
    "zip": (b"PK\x03\x04" + bytes(100), "before the first '>' header"),
    "binary after a header": (GOOD + bytes(100), r"line 4: byte b'\\x00' at base 13 of 'a'"),
    "gap": (b">a\nAC\nA-T\n", "line 3: byte b'-' at base 4 of 'a' is not an IUPAC code"),
    "stop": (b">a\nAC*\n", r"byte b'\*'"),
    "protein": (b">a\nMKLVE\n", "byte b'L'"),
    "blank inside": (b">a\nAC GT\n", "byte b' '"),
    "header without a name": (b">\nACGT\n", "line 1: a header without a name"),
    "empty record": (b">a\n>b\nACGT\n", "record 'a' has no sequence"),
    "ends after a header": (b">a\nACGT\n>b\n", "record 'b' has no sequence"),
    "ends inside a header": (b">a\nACGT\n>b", "ends inside a header"),
    "control character in a header": (b">b\nAC\n>a d\x0bACGT\nAC\n", "line 3: byte 0x0b at place 4 of the header"),
    "delete in a header": (b">a d\x7f\nAC\n", "line 1: byte 0x7f at place 4 of the header 'a' is a control character"),
    "zeros in a header": (b">a\x01\0\nAC\n", r"line 1: byte 0x01 at place 2 of the header 'a.x01.x00' is a control"),
    "zero behind a Ctrl-A": (b">a b\x01\0\nAC\n", "line 1: byte 0x00 at place 5 of the header 'a' is a control"),
    "form feed behind the name": (b">a\x0cb\nAC\n", "line 1: byte 0x0c at place 2 of the header 'a' is a control"),
    "Ctrl-A in a name": (b">gi|1\x01gi|2 foo\nAC\n", "line 1: byte 0x01 at place 5 of the header 'gi|1"),
    "name of no UTF-8": (b">a\xff\nAC\n", "line 1: byte 0xff at place 2 of the name .* is not of UTF-8 text"),
    "name that cannot be seen": (">a\u2028b\nAC\n".encode(), r"line 1: '.u2028' in the name .* is not a character"),
    "bad byte behind CR lines": (b">a\rACGT\rAC\r\nG!\n", r"line 4: byte b'!' at base 8 of 'a'"),
    "gzip cut short": (gzip.compress(TEXT)[:-2000], "gzip file is cut short"),
    "bgzip cut at a member": (bgzip(TEXT)[:-28], "bgzip file is cut short"),
    "gzip damaged": (gzip.compress(TEXT)[:500] + bytes(9000), "gzip file is (damaged|cut short)"),
    "twice": (GOOD + GOOD, "contig 'a' comes twice"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path, content, message):
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_duplicates_across_files_name_both(tmp_path):
    first, second = tmp_path / "1.fa", tmp_path / "2.fa"
    first.write_bytes(GOOD)
    second.write_bytes(GOOD)
    with pytest.raises(DataError, match=f"{second}: contig 'a' comes in {first} too"):
        read(first, second)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.fa")
