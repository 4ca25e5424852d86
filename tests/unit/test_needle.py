"""Needle tables: the motif is where the name says and nowhere else, labels and slices are balanced, distractors are
near copies of both motifs; and a table follows from its seed."""

import csv
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.needle import main
from hyena_dist.tasks.needle import LETTERS, Needle, accuracy_by_slice

NEEDLE = Needle(length=512, motif=8, mismatches=1, distractors=3, copies=4, seed=3)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(dest: Path, *arguments: str) -> int:
    return main([str(dest), "--length", "512", "--motif", "8", "--mismatches", "1", "--distractors", "3", "--copies",
                 "4", "--seed", "3", "--train", "60", "--valid", "12", "--test", "24", *arguments])


def starts(sequence: str, motif: str) -> list[int]:
    return [at for at in range(len(sequence)) if sequence.startswith(motif, at)]


def test_a_table_is_what_it_says(tmp_path: Path) -> None:
    assert write(tmp_path / "needle") == 0
    motifs = [LETTERS[motif].tobytes().decode() for motif in NEEDLE.motifs()]
    for name, count in (("train", 60), ("dev", 12), ("test", 24)):
        table = rows(tmp_path / "needle" / f"{name}.csv")
        cells = [(row["name"].split("-")[1], row["label"]) for row in table]
        assert {cells.count(cell) for cell in cells} == {count // 6}, "slices and labels are balanced"
        several = 0
        for row in table:
            at = [starts(row["sequence"], motif) for motif in motifs]
            place = int(row["name"].split("-")[3])
            assert place in at[int(row["label"])]
            assert place // 128 == int(row["name"].split("-")[1]) < 3
            assert all(start + 8 <= 384 for start in at[int(row["label"])]), "the last slice never holds it"
            assert not at[1 - int(row["label"])], "the other motif is nowhere"
            several += len(at[int(row["label"])]) > 1
        assert bool(several) == (name == "train"), "several copies are for training alone"


def test_distractors_are_near_copies_of_both_motifs_anywhere() -> None:
    rng, found = np.random.default_rng(0), np.zeros((2, 4), dtype=int)
    for number in range(60):
        bases = np.frombuffer(NEEDLE.sequence(number % 2, number % 3, rng)[0].encode(), np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(bases, 8)
        for kind, motif in enumerate(LETTERS[NEEDLE.motifs()]):
            near = np.flatnonzero((windows != motif).sum(1) == 1)
            found[kind] += np.bincount(near // 128, minlength=4)
    assert (found.sum(1) >= 180).all(), "three of each in each sequence, and a few by chance"
    assert (found > 20).all(), "in the last slice too"


def test_the_motifs_follow_from_the_seed_alone_and_rows_from_all(tmp_path: Path) -> None:
    assert (Needle(length=8192, motif=8, seed=3).motifs() == NEEDLE.motifs()).all()
    assert (Needle(length=8192, motif=8, seed=4).motifs() != NEEDLE.motifs()).any(), "the control"
    for name, more in (("one", ()), ("same", ()), ("other", ("--seed", "4"))):
        assert write(tmp_path / name, *more) == 0
    one, same, other = ((tmp_path / name / "train.csv").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    sets = [{row["sequence"] for row in rows(tmp_path / "one" / f"{name}.csv")} for name in ("train", "dev", "test")]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


@pytest.mark.parametrize(("arguments", "said"), [
    (("--length", "64"), "no room for"), (("--mismatches", "9"), "a motif of 8 bases has no 9 mismatches"),
    (("--length", "510"), "no 4 slices"), (("--slices", "1"), "slices at least 2"),
])
def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
                                    said: str) -> None:
    assert write(tmp_path / "needle", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_report_counts_by_slice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["name\tlabel\tpredicted\t0\t1", "slice-0-at-5\t0\t0\t1\t0", "slice-2-at-300\t1\t0\t1\t0",
             "slice-2-at-310\t1\t1\t0\t1"]
    assert accuracy_by_slice(lines) == {0: (1, 1), 2: (1, 2)}
    (tmp_path / "predictions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["--report", str(tmp_path / "predictions.tsv")]) == 0
    assert capsys.readouterr().out == "slice 0: 1 of 1 right, 100.0%\nslice 2: 1 of 2 right, 50.0%\n"


@pytest.mark.parametrize(("content", "said"), [
    ("", "has no line of a sequence"), ("name\tlabel\tpredicted\t0\t1\n", "has no line of a sequence"),
    ("name\tplaces\tloss\tpearson\nslice-0-at-5\t3\t1\t1\n", "line 1: does not begin with the columns name, label"),
    ("slice-0-at-5\t0\t0\n", "line 1: does not begin with"),
    ("name\tlabel\tpredicted\nslice-0-at-5\t0\t0\nchr1:5-9\t0\t0\n", "line 3: the name 'chr1:5-9' says no slice"),
    ("name\tlabel\tpredicted\nslice-x-at-5\t0\t0\n", "line 2: the name 'slice-x-at-5' says no slice"),
    ("name\tlabel\tpredicted\nslice-0-at-5\t0\n", "line 2: the name"), ("\xff", "codec can't decode")])
def test_a_report_on_something_else_is_one_line(tmp_path: Path, content: str, said: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.tsv").write_text(content, encoding="latin-1")
    assert main(["--report", str(tmp_path / "other.tsv")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: --report {tmp_path}/other.tsv: ")
    assert said in error
