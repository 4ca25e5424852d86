"""BED files choose bases: as splits, to include and to exclude, and with rows that no contig holds."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.data.bed import merged, overlap, without
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.regions import OUTSIDE as OUTSIDE_CLASS
from hyena_dist.data.regions import Regions
from tests.genomes import genome, write_fasta

SLICE = Path(__file__).parents[2] / "shards/sample/human_chr2.fa.gz"
CONTIGS = {"chr1": b"ACGT" * 250, "chr2": genome(2, 3000)["chr1"]}


def test_parts_of_spans_are_those_base_by_base():
    rng = np.random.default_rng(0)
    for _ in range(200):
        spans = [(start, start + int(rng.integers(1, 9))) for start in rng.integers(0, 60, rng.integers(0, 8)).tolist()]
        covered = {base for start, end in spans for base in range(start, end)}
        start, end = sorted(rng.choice(70, 2, replace=False).tolist())
        inside = [base for first, last in overlap(start, end, merged(spans)) for base in range(first, last)]
        outside = [base for first, last in without(start, end, merged(spans)) for base in range(first, last)]
        assert inside == [base for base in range(start, end) if base in covered]
        assert outside == [base for base in range(start, end) if base not in covered]


def build(tmp_path, capsys, *arguments, files=None):
    """Status, printed lines and shards of a build, which its dry run agrees with."""
    files = files or [write_fasta(tmp_path / "a.fa", CONTIGS)]
    said = []
    for extra in (["--dry-run"], []):
        status = build_command([*map(str, files), "--out", str(tmp_path / "out"), *map(str, arguments), *extra])
        captured = capsys.readouterr()
        said.append((status, [line for line in captured.out.splitlines() if line.startswith("note: ")], captured.err))
    assert said[0] == said[1]
    return *said[0], Manifest.load(tmp_path / "out") if status == 0 else None


def intervals(manifest, split):
    return [tuple(interval[:3]) for interval in manifest.intervals(split)]


def bed(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.bed", "a.bed.gz"])
def test_sequences_in_basenjis_form_are_exactly_the_splits(tmp_path, capsys, name):
    """chr, start, end, train|valid|test over a real slice of chromosome 2."""
    rows = [(98304, 114688, "valid"), (0, 40960, "train"), (40960, 65536, "train"), (131072, 150000, "test"),
            (65536, 98304, "train")]
    contig = "human.chr2"
    path = bed(tmp_path / name, "".join(f"{contig}\t{start}\t{end}\t{split}\n" for start, end, split in rows))
    status, _, _, manifest = build(tmp_path, capsys, "--bed", path, files=[SLICE])
    assert status == 0
    assert intervals(manifest, "train") == [(contig, 0, 98304)]
    assert intervals(manifest, "val") == [(contig, 98304, 114688)]
    assert intervals(manifest, "test") == [(contig, 131072, 150000)]


OUTSIDE = "chr1 0 600 train\nchr1 900 1500 valid\nchr1 1200 1300 valid\nchrX 0 70 train\nchr2 0 100 test\n"


def test_rows_outside_are_refused_or_cut_and_counted(tmp_path, capsys):
    path = bed(tmp_path / "a.bed", OUTSIDE)
    status, _, error, _ = build(tmp_path, capsys, "--bed", path)
    assert status == 2
    assert re.search(r"line 2: chr1:900-1500 lies outside its contig of 1000 bases.*--cut-bed", error)
    status, notes, _, manifest = build(tmp_path, capsys, "--bed", path, "--cut-bed")
    assert status == 0
    assert f"note: {path}: of 5 rows 1 were cut at the end of their contig and 2 left out, which lie behind it or " \
           "name a contig that no file has: 670 bases" in notes
    assert intervals(manifest, "train") == [("chr1", 0, 600)]
    assert intervals(manifest, "val") == [("chr1", 900, 1000)]
    assert intervals(manifest, "test") == [("chr2", 0, 100)]


def test_a_split_that_is_cut_away_whole_is_said(tmp_path, capsys):
    """And what is left is built, as of a BED of a whole genome and a file of one chromosome. The control: nothing
    left."""
    path = bed(tmp_path / "a.bed", "chr1 0 600 train\nchrX 0 70 valid\nchr1 2000 2100 test\n")
    status, notes, _, manifest = build(tmp_path, capsys, "--bed", path, "--cut-bed")
    assert status == 0
    assert f"note: {path}: no row of val, test is inside a contig" in notes
    assert intervals(manifest, "train") == [("chr1", 0, 600)]
    (tmp_path / "x").mkdir()
    path = bed(tmp_path / "a.bed", "chrX 0 70 train\n")
    status, _, error, _ = build(tmp_path / "x", capsys, "--bed", path, "--cut-bed")
    assert status == 2
    assert "no base of these files can be scored" in error


def test_nothing_is_said_of_rows_where_all_lie_inside(tmp_path, capsys):
    """The control of the count."""
    path = bed(tmp_path / "a.bed", "human.chr2 0 600 train\n")
    assert build(tmp_path, capsys, "--bed", path, "--cut-bed", files=[SLICE])[1] == []


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_rows_outside_of_regions_are_treated_alike(tmp_path, capsys, option):
    path = bed(tmp_path / "a.bed", "chr1 0 600\nchr1 900 1500\nchrX 0 70\n")
    status, _, error, _ = build(tmp_path, capsys, option, path)
    assert status == 2
    assert "line 2: chr1:900-1500 lies outside its contig of 1000 bases" in error
    path = bed(tmp_path / "a.bed", "chr1 0 600\nchrX 0 70\n")
    status, _, error, _ = build(tmp_path, capsys, option, path)
    assert status == 2
    assert "line 2: contig 'chrX' is in none of the files" in error
    status, notes, _, _ = build(tmp_path, capsys, option, path, "--cut-bed")
    assert status == 0
    assert f"note: {path}: of 2 rows 0 were cut at the end of their contig and 1 left out" in notes[0]


def test_regions_choose_inside_the_splits(tmp_path, capsys):
    """Overlapping rows, rows over a border of two splits, two files of each kind."""
    splits = bed(tmp_path / "splits.bed", "chr1 0 500 train\nchr1 500 1000 val\nchr2 0 3000 train\n")
    include = bed(tmp_path / "in.bed", "chr1\t100\t700\tgene\t0\t+\nchr1 650 900\nchr2 10 20\nchr2 20 90\n")
    also = bed(tmp_path / "also.bed.gz", "chr1 0 1000\nchr2 0 50\n")
    gaps = bed(tmp_path / "gaps.bed", "chr1 480 520\nchr1 0 110\n")
    more = bed(tmp_path / "more.bed", "chr2 15 16\n")
    status, notes, _, manifest = build(tmp_path, capsys, "--bed", splits, "--include", include, "--include", also,
                                       "--exclude", gaps, "--exclude", more)
    assert status == 0
    assert intervals(manifest, "train") == [("chr1", 110, 480), ("chr2", 10, 15), ("chr2", 16, 50)]
    assert intervals(manifest, "val") == [("chr1", 520, 900)]
    assert f"note: --include and --exclude leave out {4000 - 370 - 5 - 34 - 380:,} bases" in notes


def test_regions_that_leave_nothing_are_refused(tmp_path, capsys):
    """By name; also where only one split is left without a base."""
    everything = bed(tmp_path / "all.bed", "chr1 0 1000\nchr2 0 3000\n")
    status, _, error, _ = build(tmp_path, capsys, "--exclude", everything)
    assert status == 2
    assert "no base of these files can be scored" in error
    chr2 = bed(tmp_path / "chr2.bed", "chr2 0 3000\n")
    status, _, error, _ = build(tmp_path, capsys, "--exclude", chr2, "--val-contigs", "chr2")
    assert status == 2
    assert f"--val-contigs, --exclude {chr2}: no base of split val can be scored" in error


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no rows"), ("chr1 5\n", "line 1: has 2 columns; write contig, start, end"),
    ("chr1 0 10\nchr1 9 9\n", "line 2: start '9' and end '9'"), ("x" * 70_000, "a line has more than 65,536 bytes"),
])
def test_bad_regions_end_in_one_line(tmp_path, capsys, text, message):
    path = bed(tmp_path / "a.bed", text)
    for option in ("--include", "--exclude"):
        status, _, error, _ = build(tmp_path, capsys, option, path)
        assert status == 2
        assert error.startswith(f"error: {path}: ")
        assert error.count("\n") == 1
        assert message in error


def test_classes_of_several_words_are_told_apart(tmp_path):
    path = tmp_path / "a.bed"
    path.write_text("track\tname=x\nc\t0\t10\tprotein coding\nc\t5\t20\tprotein binding\nc 30 40 protein coding\n")
    found = Regions(path, {"c": 100})
    labels = found.labels("c", 0, 40)
    assert [found.classes[labels[place]] for place in (0, 7, 15, 25, 35)] == [
        ("protein coding",), ("protein coding", "protein binding"), ("protein binding",), (OUTSIDE_CLASS,),
        ("protein",)]


@pytest.mark.parametrize(("row", "message"), [
    (f"c\t0\t10\t{OUTSIDE_CLASS}", "'outside the BED', which is the class of the bases in no row"),
    ("c\t0\t10\t\t0\t+", "line 2: column 4 is empty; write contig, start, end, class"),
    ("\tc\t0\t10", "line 2: has 3 columns"), ("c\t\t0\t10\tx", "line 2: column 2 is empty")])
def test_a_class_that_is_none_is_refused(tmp_path, row, message):
    (tmp_path / "a.bed").write_text(f"c\t0\t10\texon\n{row}\n")
    with pytest.raises(DataError, match=re.escape(message)):
        Regions(tmp_path / "a.bed", {"c": 100})
