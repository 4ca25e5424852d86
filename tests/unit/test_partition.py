"""Splits that are apart: what stands in two of them is counted, or kept on one side."""

from pathlib import Path

import numpy as np
import pytest

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.data.tables import Cut, Example, reverse_complement
from tests.unit.test_tables import read, write

GENOME = "".join(np.random.default_rng(0).choice(list("ACGT"), 600))


def sequences(count: int, seed: int = 1) -> list[str]:
    return ["".join(row) for row in np.random.default_rng(seed).choice(list("ACGT"), (count, 12))]


def other_strand(text: str) -> str:
    return reverse_complement(text.encode()).decode()


def table(path: Path, texts: list[str], labels: list[str] | None = None) -> Path:
    labels = labels or [str(number % 2) for number in range(len(texts))]
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    return write(path, "\n".join(["sequence,label", *rows]) + "\n")


def apart(found: Labelled) -> list[str]:
    """The notes on what stands in two splits."""
    return [note for note in found.notes if "is found there" in note]


def test_the_other_strand_of_a_sequence_is_a_copy_where_both_are_read(tmp_path: Path) -> None:
    texts = sequences(20)
    train = table(tmp_path / "t.csv", texts)
    test = table(tmp_path / "test.csv", [other_strand(text).lower() for text in texts[:6]] + sequences(4, 2))
    for rc in ("augment", "average"):
        [*_, note] = apart(read(train, test=str(test), valid=str(table(tmp_path / "v.csv", sequences(4, 3))), rc=rc))
        assert note == ("6 different sequences are in train and in test, on this strand or the other: what is found "
                        "there is too good")
    assert apart(read(train, test=str(test), valid=str(tmp_path / "v.csv"))) == [], "the control: one strand is read"


def test_the_strands_of_a_sequence_are_drawn_together(tmp_path: Path) -> None:
    texts = sequences(30)
    both = table(tmp_path / "t.csv", texts + [other_strand(text) for text in texts])
    for seed in range(3):
        assert apart(read(both, seed=seed, rc="average", valid_fraction=0.3)) == []
        valid, train = ({example.bases for example in found} for found in (
            read(both, seed=seed, valid_fraction=0.3).splits[name] for name in ("valid", "train")))
        assert {reverse_complement(bases) for bases in valid} & train, "the control"


def intervals(path: Path, rows: list[tuple[int, int, str, str]]) -> dict[str, str]:
    """Keys for a table of intervals with start, end, strand and split."""
    genome = write(path.with_name("g.fa"), f">chr1\n{GENOME}\n")
    text = "".join(f"chr1\t{start}\t{end}\t{strand}\t{split}\tc{n % 2}\n" for n, (start, end, strand, split)
                   in enumerate(rows))
    return {"table": str(write(path, "chrom\tstart\tend\tstrand\tsplit\tlabel\n" + text)), "genome": str(genome)}


def of(keys: dict[str, str], most: int = 100, **more: str) -> Labelled:
    return read_labelled(FinetuneSection(**keys, **more), seed=0, most=most)


TRAIN = [(0, 40, "+", "train"), (30, 70, "+", "train"), (300, 340, "-", "train")]
VALID = [(500, 540, "+", "valid"), (540, 580, "-", "valid")]


def test_intervals_that_overlap_across_splits_are_counted(tmp_path: Path) -> None:
    test = [(60, 100, "-", "test"), (70, 110, "+", "test"), (310, 350, "+", "test"), (579, 600, "+", "test")]
    assert apart(of(intervals(tmp_path / "t.tsv", TRAIN + VALID + test))) == [
        "2 of the 4 intervals of test overlap intervals of train: what is found there may be too good; hold out whole "
        "chromosomes",
        "1 of the 4 intervals of test overlap intervals of valid: what is found there may be too good; hold out whole "
        "chromosomes"]
    assert apart(of(intervals(tmp_path / "t.tsv", TRAIN + VALID + test[1:2] * 2))) == [], "the control: they touch"


def test_only_what_is_kept_of_an_interval_overlaps(tmp_path: Path) -> None:
    """The right part of (300, 340) on the other strand is (300, 320)."""
    keys = intervals(tmp_path / "t.tsv", TRAIN + VALID + [(320, 340, "+", "test"), (280, 300, "+", "test")])
    found = of(keys, most=20, longer="right")
    assert found.splits["train"][2].bases.decode() == other_strand(GENOME[300:320])
    assert apart(found) == []
    assert len(apart(of(keys))) == 1, "the control"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_part_of_an_interval_is_that_part_of_its_bases(reverse: bool) -> None:
    whole = Example("x", Cut(GENOME.encode(), 10, 50, reverse), "", "")
    assert whole.part(3, 20).bases == whole.bases[3:23] != whole.bases[4:24]
    assert isinstance(whole.part(3, 20).held, Cut), "and still no copy of it"


@pytest.mark.parametrize(("task", "rc", "labels", "odd"), [
    ("classification", "none", ("a", "b"), 1), ("classification", "none", ("a", "a"), 0),
    ("regression", "none", ("0.5", "1"), 1), ("regression", "none", ("0.5", "0.50"), 0),
    ("multilabel", "none", ("a;b", "b"), 1), ("multilabel", "none", ("a;b", "b;a"), 0),
    ("per_base", "none", ("a" * 12, "b" * 12), 1), ("binned", "none", ("1 2", "1 3"), 1),
    ("binned", "none", ("1 2", "1.0 2"), 0),
    ("classification", "average", ("a", "a", "b"), 1), ("classification", "none", ("a", "a", "b"), 0),
    ("per_base", "average", ("a" * 12, "a" * 12, "b" * 12), 0),
])
def test_one_sequence_with_several_labels_is_counted(tmp_path: Path, task: str, rc: str, labels: tuple[str, ...],
                                                     odd: int) -> None:
    """The first sequence comes twice and, of three labels, also as its other strand."""
    plain = {"classification": "ab", "multilabel": "ab", "regression": "12", "per_base": ("a" * 12, "b" * 12),
             "binned": ("1 2", "2 1")}[task]
    texts = sequences(12)
    first = [texts[0], texts[0].lower(), other_strand(texts[0])][: len(labels)]
    path = table(tmp_path / "t.csv", [*first, *texts[1:]], [*labels, *(plain[n % 2] for n in range(11))])
    found = read(path, task=task, rc=rc, bin_size=6)
    assert [note for note in found.notes if "different labels" in note] == [
        "1 different sequences come more than once, with different labels: no answer is right for all of these"] * odd


BED = "chr1\t0\t20\tA\nchr1\t590\t600\tA\nchr1\t50\t60\tB\nchr1\t320\t330\tB\nchr1\t65\t66\tC\nchr1\t539\t541\tC\n"
"""Of family A a test interval is, of C a validation interval, of B training intervals alone."""
BLAST = "".join(f"{query}\t{subject}\t99.0\t20\t0\t0\t{first}\t{last}\t{start}\t{end}\t1e-9\t40\n" for
                query, subject, first, last, start, end in (
                    ("chr1", "chr1", 1, 20, 600, 591), ("chr1:40-70", "chr1", 26, 26, 540, 541)))
PAIRS = "chr1:0-20\tchr1:590-600\t50\nchr1:65-66\tchr1:539-541\t50\n"
"""The same as A and C."""
TEST = [(580, 600, "+", "test"), (200, 220, "-", "test")]


@pytest.mark.parametrize("text", [BED, BLAST, PAIRS])
def test_what_is_alike_to_held_out_intervals_does_not_train(tmp_path: Path, text: str) -> None:
    keys = intervals(tmp_path / "t.tsv", [*TRAIN, (400, 440, "+", "train"), *VALID, *TEST])
    path = write(tmp_path / "alike", text)
    found, without = of(keys, homology=str(path)), of(keys)
    assert [e.name for e in found.splits["train"]] == ["chr1:300-340(-)", "chr1:400-440"]
    assert [e.name for e in without.splits["train"]][:2] == ["chr1:0-40", "chr1:30-70"], "the control"
    assert f"{path}: 2 of 4 training intervals do not train, as they are alike to validation or test (2 families)" \
        in found.notes
    assert {name: found.splits[name] for name in ("valid", "test")} == {
        name: without.splits[name] for name in ("valid", "test")}


def test_what_is_alike_to_the_part_that_a_seed_draws_does_not_train(tmp_path: Path) -> None:
    """Each training interval has a relative; where one is drawn, the other does not train."""
    rows = [(20 * n, 20 * n + 20, "+", "train") for n in range(28)]
    text = "".join(f"chr1\t{start}\t{end}\t{start // 40}\n" for start, end, *_ in rows)
    keys = {**intervals(tmp_path / "t.tsv", rows), "homology": str(write(tmp_path / "alike.bed", text))}
    for seed in range(3):
        found = read_labelled(FinetuneSection(**keys, valid_fraction=0.2), seed=seed, most=100)
        families = [{e.held.start // 40 for e in found.splits[name] if isinstance(e.held, Cut)}
                    for name in ("train", "valid")]
        assert not families[0] & families[1]
        assert len(found.splits["train"]) + len(found.splits["valid"]) < 28, "the control"


@pytest.mark.parametrize(("text", "said"), [
    ("1\t0\t20\tA\n", "alike: line 1: contig '1', as all others in it, has no interval in finetune.table.*chr1 or 1"),
    ("chr2\t0\t5\tA\nchr1\t590\t601\tA\n", "alike: line 2: region chr1:590-601 reaches past the 600 bases"),
    ("chr1\t0\t600\tA\n", "alike: all 4 training intervals are alike to validation or test"),
    ("chr1\t0\n", "alike: line 1: is no row of"), ("", "alike: "),
])
def test_homologies_that_cannot_be_used_are_refused(tmp_path: Path, text: str, said: str) -> None:
    keys = intervals(tmp_path / "t.tsv", [*TRAIN, (400, 440, "+", "train"), *VALID, *TEST])
    with pytest.raises(DataError, match=said):
        of(keys, homology=str(write(tmp_path / "alike", text)))
