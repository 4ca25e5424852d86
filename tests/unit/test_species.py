"""Windows of genomes for species classification: by seed, of their own split alone, on the right places."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.species import main
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.labelled import read_labelled
from tests.genomes import write_fasta

SIZES = ["--train", "20", "--val", "6", "--test", "8", "--length", "64"]


def bases(seed: int, count: int) -> bytes:
    return bytes(np.random.default_rng(seed).choice(np.frombuffer(b"ACGTacgt", np.uint8), count))


@pytest.fixture
def genomes(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """Fly has three contigs, and yeast one."""
    found = {"fly": {"2L": bases(0, 3000), "3R": bases(1, 1000), "X": bases(2, 900)}, "yeast": {"I": bases(3, 5000)}}
    for species, contigs in found.items():
        write_fasta(tmp_path / f"{species}.fa", contigs)
    (tmp_path / "held.bed").write_text("# the last fifth tests\nyeast.I\t3500\t4000\tval\nyeast.I\t4000\t5000\ttest\n")
    return found


def command(tmp_path: Path, out: str, *more: str, files: tuple[str, ...] = ("fly", "yeast")) -> list[str]:
    return [*(f"{name}={tmp_path}/{name}.fa" for name in files), *SIZES, "--val-contigs", "fly.3R", "--test-contigs",
            "fly.X", "--held-out", f"{tmp_path}/held.bed", "--out", f"{tmp_path}/{out}", *more]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_windows_are_of_their_split_alone(tmp_path: Path, genomes: dict[str, dict[str, bytes]]) -> None:
    assert main(command(tmp_path, "table")) == 0
    allowed = {("fly", "train"): [("2L", 0, 3000)], ("fly", "dev"): [("3R", 0, 1000)], ("fly", "test"): [("X", 0, 900)],
               ("yeast", "train"): [("I", 0, 3500)], ("yeast", "dev"): [("I", 3500, 4000)],
               ("yeast", "test"): [("I", 4000, 5000)]}
    for split, count in (("train", 20), ("dev", 6), ("test", 8)):
        found = rows(tmp_path / "table" / f"{split}.csv")
        assert [row["label"] for row in found].count("fly") == [row["label"] for row in found].count("yeast") == count
        assert len({(row["label"], row["name"]) for row in found}) == 2 * count, "no window comes twice"
        for row in found:
            contig, _, place = row["name"].rpartition(":")
            start, end = map(int, place.split("-"))
            assert row["sequence"].encode() == genomes[row["label"]][contig][start:end]
            assert end - start == 64
            [(name, first, last)] = allowed[row["label"], split]
            assert (contig, first <= start, end <= last) == (name, True, True)
    labelled = read_labelled(FinetuneSection(table=str(tmp_path / "table")), seed=0, most=64)
    assert labelled.classes == ["fly", "yeast"]
    said = json.loads((tmp_path / "table/windows.json").read_text("utf-8"))
    assert said["splits"]["test"]["yeast"] == {"windows": 8, "bases": 1000, "disjoint": 15}
    assert said["notes"] == []


def test_the_seed_and_the_species_decide_not_the_order_of_files(tmp_path: Path,
                                                                genomes: dict[str, dict[str, bytes]]) -> None:
    del genomes
    for out, more, files in (("one", (), ("fly", "yeast")), ("same", (), ("yeast", "fly")),
                             ("other", ("--seed", "1"), ("fly", "yeast"))):
        assert main(command(tmp_path, out, *more, files=files)) == 0
    one, same, other = ({(row["label"], row["name"]) for row in rows(tmp_path / out / "test.csv")}
                        for out in ("one", "same", "other"))
    assert one == same != other


def test_unknown_bases_are_passed_over_and_overlap_is_said(tmp_path: Path, genomes: dict[str, dict[str, bytes]],
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    write_fasta(tmp_path / "fly.fa", {**genomes["fly"], "2L": b"N" * 1500 + genomes["fly"]["2L"][1500:]})
    assert main(command(tmp_path, "table", "--test", "20")) == 0
    assert all(row["sequence"].count("N") <= 6 for row in rows(tmp_path / "table/train.csv"))
    assert "test of yeast: 1,000 bases have room for 15 windows that share none, not for 20" in capsys.readouterr().out
    write_fasta(tmp_path / "fly.fa", {**genomes["fly"], "2L": b"N" * 3000})
    assert main(command(tmp_path, "none")) == 2
    assert "train of fly has 0 windows of 64 bases with at most 10% unknown" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "none.tmp").exists()


@pytest.mark.parametrize(("more", "said"), [
    (["--test-contigs", "fly.Y"], "--test-contigs: 'fly.Y' is in none of the files"),
    (["--val-contigs", "fly.X"], "fly.X: bases of it are held out for val and for test|is in both"),
    (["--length", "2000"], "has 0 places for windows of 2,000 bases, and 6 are wanted"),
    (["--held-out", "other.bed"], "the fourth column is 'train', and must be val or test"),
    (["--held-out", "far.bed"], "lies outside its contig of 5000 bases"),
    (["--held-out", "fly.fa"], "has 3 columns; write contig, start, end, val or test"),
    (["--seed", "-1"], "--seed must be 0 or greater"),
    (["yeast=fly.fa"], "write a name of its own for its species"), (["nowhere.fa"], "cannot be read|write a name"),
    (["--out", "."], "is there already: give another"),
])
def test_mistakes_are_one_line(tmp_path: Path, genomes: dict[str, dict[str, bytes]], more: list[str], said: str,
                               capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    del genomes
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.bed").write_text("yeast.I\t3500\t4000\ttrain\n", encoding="utf-8")
    (tmp_path / "far.bed").write_text("yeast.I\t3500\t9000\ttest\n", encoding="utf-8")
    place = 0 if not more[0].startswith("--") else len(command(tmp_path, "table"))
    arguments = command(tmp_path, "table")
    assert main([*arguments[:place], *more, *arguments[place:]]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1), error
    assert any(words in error for words in said.split("|")), error
    assert not (tmp_path / "table").exists()


def test_one_species_is_refused(tmp_path: Path, genomes: dict[str, dict[str, bytes]],
                                capsys: pytest.CaptureFixture[str]) -> None:
    del genomes
    assert main([f"fly={tmp_path}/fly.fa", "--length", "64", "--out", f"{tmp_path}/table"]) == 2
    assert "one species is none to tell apart" in capsys.readouterr().err
