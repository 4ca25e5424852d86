"""The commands of docs/published-recipe.md make the splits that it tells of, of a small genome in the form of hg38."""

import hashlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hyena_dist.cli.build import main as build
from hyena_dist.cli.verify import main as verify
from hyena_dist.data.contigs import Source
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.sources import read_contigs
from tests.genomes import genome, write_fasta

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/published-recipe.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
ROW = 131_072
ROWS = [("chr2", 10, "valid"), ("chr2", 0, "train"), ("chr2", 1, "train"), ("chr2", 5, "test"), ("chr2", 6, "valid"),
        ("chr2", 3, "train"), ("chr14", 0, "train"), ("chr14", 1, "valid"), ("chrX", 1, "train"), ("chrX", 0, "test")]
"""As Basenji's: in no order, some that touch, and some of the paper's test chromosomes that train. By contig and number
of the row; contigs are longer, and one is in no row."""
LENGTHS = {"chr14": 3 * ROW, "chrX": 2 * ROW + 7, "chr10": 2000, "chr9_random": 5000}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("recipe")
    (chr2,) = read_contigs([Source(ROOT / "shards/sample/human_chr2.fa.gz")])
    contigs = {"chr2": chr2.bases[: 12 * ROW].tobytes()}
    for seed, (name, bases) in enumerate(LENGTHS.items()):
        contigs[name] = genome(seed, bases)["chr1"]
    write_fasta(found / "hg38.fa.gz", contigs)
    (found / "hg38.chrom.sizes").write_text("".join(f"{name}\t{len(bases)}\n" for name, bases in contigs.items()))
    (found / "sequences_human.bed").write_text("".join(
        f"{contig}\t{number * ROW}\t{(number + 1) * ROW}\t{split}\n" for contig, number, split in ROWS))
    (found / "shards").mkdir()
    return found


def splits(directory, out):
    """What the command that builds these shards makes, and the commands that are needed before it."""
    place = next(place for place, command in enumerate(COMMANDS) if command.endswith(f"--out {out}"))
    if "awk" in COMMANDS[place - 1]:
        subprocess.run(["bash", "-c", COMMANDS[place - 1]], cwd=directory, check=True)
    arguments = shlex.split(COMMANDS[place])
    assert arguments[:2] == ["python", "shards/build.py"]
    assert build(arguments[2:]) == 0
    manifest = Manifest.load(out)
    return {split: {interval[:3] for interval in manifest.intervals(split)} for split in ("train", "val", "test")}


def rows(*found):
    return {(contig, first * ROW, last * ROW) for contig, first, last in found}


def test_as_published_the_splits_are_those_of_the_rows(directory, monkeypatch):
    monkeypatch.chdir(directory)
    found = splits(directory, "shards/hg38-basenji")
    assert found == {"train": rows(("chr2", 0, 2), ("chr2", 3, 4), ("chr14", 0, 1), ("chrX", 1, 2)),
                     "val": rows(("chr2", 10, 11), ("chr2", 6, 7), ("chr14", 1, 2)),
                     "test": rows(("chr2", 5, 6), ("chrX", 0, 1))}


def test_without_leakage_the_papers_test_chromosomes_are_held_out_whole(directory, monkeypatch):
    """What was a test row elsewhere validates; the two rows touch, and are one stretch."""
    monkeypatch.chdir(directory)
    found = splits(directory, "shards/hg38")
    assert found == {"train": rows(("chr2", 0, 2), ("chr2", 3, 4)),
                     "val": rows(("chr2", 10, 11), ("chr2", 5, 7)),
                     "test": rows(("chr14", 0, 2), ("chrX", 0, 2))}
    place = next(place for place, command in enumerate(COMMANDS) if command.startswith("sha256sum"))
    subprocess.run(["bash", "-c", COMMANDS[place]], cwd=directory, check=True)
    kept = (directory / "shards/hg38/sources.sha256").read_text().splitlines()
    assert [line.split()[1] for line in kept] == ["hg38.fa.gz", "sequences_human.bed", "leak-free.bed"]
    assert verify(["shards/hg38", "--fasta", "hg38.fa.gz"]) == 0, "a file more beside the shards is no fault"


def test_whole_chromosomes_for_long_windows(directory, monkeypatch):
    monkeypatch.chdir(directory)
    found = splits(directory, "shards/hg38-chromosomes")
    assert found == {"train": {("chr2", 0, 12 * ROW)}, "val": {("chr10", 0, 2000)},
                     "test": {("chr14", 0, 3 * ROW), ("chrX", 0, 2 * ROW + 7)}}


def test_the_checksum_is_compared(directory):
    command = next(command for command in COMMANDS if command.endswith("md5sum -c"))
    command = re.sub(r"curl -s \S+/md5sum.txt", "cat md5sum.txt", command)
    right = hashlib.md5((directory / "hg38.fa.gz").read_bytes(), usedforsecurity=False).hexdigest()
    for digest, status in ((right, 0), (right[::-1], 1)):
        sums = {"hg38.2bit": "0" * 32, "hg38.fa.gz": digest, "x.hg38.fa.gz": "1" * 32}
        (directory / "md5sum.txt").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
        done = subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True, check=False)
        assert (done.returncode, "hg38.fa.gz: OK" in done.stdout) == (status, not status)


def test_every_published_preset_trains_on_the_shards_that_are_built_by_default():
    presets = sorted((ROOT / "configs/published").glob("*.yaml"))
    assert len(presets) == 7
    assert all("  shards: shards/hg38  # docs/published-recipe.md" in path.read_text() for path in presets)
