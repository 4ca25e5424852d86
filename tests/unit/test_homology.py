"""What is alike to held-out sequence does not train."""

import re

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.data.manifest import Manifest
from tests.genomes import write_fasta

CONTIGS = {name: np.random.default_rng(number).choice(np.frombuffer(b"ACGT", np.uint8), 3000).tobytes()
           for number, name in enumerate(("chr1", "chr2", "chr3"))}


def build(tmp_path, capsys, text, *arguments):
    table = tmp_path / "alike"
    table.write_text(text)
    fasta = write_fasta(tmp_path / "a.fa", CONTIGS)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    status = build_command([str(fasta), "--homology", str(table), "--out", str(out), *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err, Manifest.load(out) if status == 0 else None


def intervals(manifest, split):
    return [tuple(row[:3]) for row in manifest.intervals(split)]


def blast(query, subject, places, identity="97.500"):
    return "\t".join([query, subject, identity, "300", "2", "0", *map(str, places), "1e-50", "550"]) + "\n"


EXPECTED = [("chr1", 0, 500), ("chr1", 800, 3000), ("chr3", 0, 3000)]
FORMS = {
    "BED": "# regions\nchr1 500 800 A\nchr2 0 10 A\nchr1 1000 1100 B\nchr3 5 9 B\nchr2 50 70 C\n",
    "BLAST": blast("chr1", "chr2", (501, 800, 1, 300)) + blast("chr1", "chr3", (1, 9, 20, 28)),
    "BLAST of the other strand": blast("chr2", "chr1", (7, 310, 800, 501)),
    "BLAST of pieces": blast("chr1:400-900", "chr2:10-20(+)", (101, 400, 1, 5)),
    "pairs": "chr2:10-20\tchr1:500-800\t95\nchr1:1-2\tchr3:1-2\t70\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_regions_alike_to_held_out_bases_do_not_train(tmp_path, capsys, form):
    """In every form; those that are alike to what trains are left alone."""
    status, printed, _, manifest = build(tmp_path, capsys, FORMS[form], "--val-contigs", "chr2")
    assert status == 0
    assert intervals(manifest, "train") == EXPECTED
    assert intervals(manifest, "val") == [("chr2", 0, 3000)]
    families = 2 if form == "BED" else 1
    assert f"alike: 300 bases do not train, of {families} families with held-out bases\n" in printed


def test_held_out_bases_stay_and_so_do_those_of_other_ways_to_choose(tmp_path, capsys):
    """Both regions on one contig, one of them partly held out, beside an exclusion. The control: nothing held out."""
    bed, gaps = tmp_path / "a.bed", tmp_path / "gaps.bed"
    bed.write_text("chr1 0 1000 train\nchr1 1000 1100 val\nchr2 0 900 test\nchr2 900 3000 train\n")
    gaps.write_text("chr1 300 400\nchr1 1050 1060\n")
    text = "chr1 900 1001 A\nchr1 100 200 A\nchr2 2000 2100 A\nchr2 899 901 B\nchr1 0 10 B\n"
    status, printed, _, manifest = build(tmp_path, capsys, text, "--bed", bed, "--exclude", gaps)
    assert status == 0
    assert intervals(manifest, "train") == [("chr1", 10, 100), ("chr1", 200, 300), ("chr1", 400, 900),
                                            ("chr2", 901, 2000), ("chr2", 2100, 3000)]
    assert intervals(manifest, "val") == [("chr1", 1000, 1050), ("chr1", 1060, 1100)]
    assert intervals(manifest, "test") == [("chr2", 0, 900)]
    assert "311 bases do not train, of 2 families" in printed
    status, printed, _, manifest = build(tmp_path, capsys, text)
    assert "0 bases do not train, of 0 families" in printed
    assert sum(end - start for _, start, end in intervals(manifest, "train")) == 9000


def test_a_copy_that_a_build_refuses_may_be_told_by_a_table(tmp_path, capsys, monkeypatch):
    """The whole way: refused as a copy, and built when the homology says where it is."""
    monkeypatch.setitem(CONTIGS, "chr3", CONTIGS["chr3"][:700] + CONTIGS["chr2"][1000:2000] + CONTIGS["chr3"][1700:])
    status, _, error, _ = build(tmp_path, capsys, "chr1 0 1 A\n", "--val-contigs", "chr2")
    assert status == 2
    assert "held-out sequence also trains" in error
    status, _, _, manifest = build(tmp_path, capsys, blast("chr3", "chr2", (701, 1700, 1001, 2000), "100.000"),
                                   "--val-contigs", "chr2")
    assert status == 0
    assert intervals(manifest, "train") == [("chr1", 0, 3000), ("chr3", 0, 700), ("chr3", 1700, 3000)]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no rows; give a BED of regions or a table of BLAST hits"),
    ("chr1 0 10\n", "line 1: is no row of contig, start, end, name; nor twelve"),
    ("chr1 0 x A\n", "line 1: is no row"), ("chr1 10 10 A\n", "line 1: is no row"),
    (blast("chr1", "chr2", (0, 9, 1, 9)), "line 1: is no row"), (blast("chr1", "chr2", ("x", 9, 1, 9)), "is no row"),
    ("chr1 0 10 A\n" + blast("chr1", "chr2", (1, 9, 1, 9)), "line 2: is of the form BLAST, the lines before are BED"),
    ("chr1 0 10 A\nchr9 0 10 A\n", "line 2: region chr9:0-10: the contig is in none of the files"),
    ("chr1 0 3001 A\n", "line 1: region chr1:0-3001: the contig has 3,000 bases; .*--cut-bed"),
])
def test_bad_tables_end_in_one_line(tmp_path, capsys, text, message):
    status, _, error, _ = build(tmp_path, capsys, text, "--val-contigs", "chr2")
    assert status == 2
    assert error.startswith(f"error: {tmp_path / 'alike'}: ")
    assert error.count("\n") == 1

    assert re.search(message, error)


def test_regions_outside_are_left_out_and_counted_where_asked(tmp_path, capsys):
    text = "chr1 0 3001 A\nchr9 0 5 A\nchr2 5 6 A\n"
    status, printed, _, manifest = build(tmp_path, capsys, text, "--val-contigs", "chr2", "--cut-bed")
    assert status == 0
    assert "3,000 bases do not train, of 1 families with held-out bases; 2 regions lie outside of the files" in printed
    assert intervals(manifest, "train") == [("chr3", 0, 3000)]
