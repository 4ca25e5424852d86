"""Labels of places: every form that they are written in gives the same arrays, what is not known is not scored, and
what does not fit is refused with the file and the row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.data.places import Values
from hyena_dist.data.tokenizer import IGNORE

BASES = ("ACGTACGTACGT", "GGGGCCCCAATT", "TTTTACACACAC", "ACACGTGTACAC")
BINS = dict(task="binned", bin_size=4)


def read(table: Path, **keys: Any) -> Labelled:
    return read_labelled(FinetuneSection(table=str(table), valid_fraction=0.25, **keys), seed=0, most=64)


def csv(directory: Path, labels: list[str], name: str = "table.csv") -> Path:
    path = directory / name
    rows = [f"{bases},{label}" for bases, label in zip(BASES, labels, strict=True)]
    path.write_text("\n".join(["sequence,label", *rows]) + "\n")
    return path


def unlabelled(directory: Path, array: np.ndarray, name: str = "rows") -> Path:
    np.save(directory / f"{name}.npy", array)
    path = directory / f"{name}.csv"
    path.write_text("\n".join(["sequence", *BASES]) + "\n")
    return path


def arrays(labelled: Labelled) -> dict[bytes, np.ndarray]:
    return {example.bases: labelled.at_places(split, number) for split, examples in labelled.splits.items()
            for number, example in enumerate(examples)}


def same(one: dict[bytes, np.ndarray], other: dict[bytes, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


TRACKS = np.arange(24, dtype=np.float64).reshape(4, 3, 2)


def test_numbers_of_bins_are_the_same_in_every_form(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    beside = arrays(read(unlabelled(tmp_path, TRACKS), **BINS))
    assert {value.shape for value in beside.values()} == {(3, 2)}
    assert np.array_equal(beside[BASES[1].encode()], TRACKS[1])
    for number, row in enumerate(TRACKS):
        np.save(tmp_path / f"row-{number}.npy", row)
    assert same(arrays(read(csv(tmp_path, [f"row-{n}.npy" for n in range(4)]), **BINS)), beside)
    parquet.write_table(pyarrow.table({"sequence": BASES, "label": TRACKS.tolist()}), tmp_path / "lists.parquet")
    assert same(arrays(read(tmp_path / "lists.parquet", **BINS)), beside)
    single = arrays(read(csv(tmp_path, [" ".join(map(str, row[:, 0])) for row in TRACKS], "text.csv"), **BINS))
    assert all(np.array_equal(single[key][:, 0], beside[key][:, 0]) for key in beside)


def test_intervals_have_rows_beside_them_and_are_cut_when_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "genome.fa").write_text(">c1\n" + "".join(BASES) + "\n>c2\nACGT\n")
    (tmp_path / "peaks.bed").write_text("".join(f"c1\t{12 * n}\t{12 * n + 12}\n" for n in range(4)))
    np.save(tmp_path / "peaks.npy", TRACKS)
    found = read(tmp_path / "peaks.bed", genome=str(tmp_path / "genome.fa"), **BINS)
    assert same(arrays(found), arrays(read(unlabelled(tmp_path, TRACKS), **BINS)))
    for example in found.splits["train"]:
        assert not isinstance(example.held, bytes), "no copy of the bases is kept"
        assert example.length == 12


def test_classes_of_bases_are_letters_or_numbers(tmp_path: Path) -> None:
    letters = read(csv(tmp_path, ["iiieeeiii...", "eeeeeeeeeeee", "iiiiiiiiiiii", "eieieieieiei"]), task="per_base")
    assert letters.classes == ["e", "i"]
    first = arrays(letters)[BASES[0].encode()]
    assert first.tolist() == [1] * 3 + [0] * 3 + [1] * 3 + [IGNORE] * 3
    numbers = np.zeros((4, 12), dtype=np.int8)
    numbers[:, 3:] = 5
    numbers[:, 11] = -1
    found = read(unlabelled(tmp_path, numbers), task="per_base")
    assert found.classes == ["0", "5"]
    assert arrays(found)[BASES[2].encode()].tolist() == [0] * 3 + [1] * 8 + [IGNORE]


DIGITS = ("011022010...", "000000000000", "111111111111", "210210210210")


def test_classes_of_bases_are_digits_or_numbers(tmp_path: Path) -> None:
    """Without blanks they are letters, one for each base, and else numbers: both say the same."""
    letters = read(csv(tmp_path, list(DIGITS)), task="per_base")
    rows = [separator.join(row).replace(".", "-1") for row, separator in zip(DIGITS, " ;, ", strict=True)]
    numbers = read(csv(tmp_path, [f'"{row}"' for row in rows], "numbers.csv"), task="per_base")
    assert letters.classes == numbers.classes == ["0", "1", "2"]
    assert same(arrays(letters), arrays(numbers))
    assert arrays(numbers)[BASES[0].encode()].tolist() == [0, 1, 1, 0, 2, 2, 0, 1, 0, *[IGNORE] * 3]


@pytest.mark.parametrize("text", ["1e0000000001", "0_1_0_1_0_11", "nan.nan.nann"])
def test_letters_that_look_like_one_number_are_letters(tmp_path: Path, text: str) -> None:
    found = read(csv(tmp_path, [text] * 4), task="per_base")
    assert found.classes == sorted(set(text) - {"."})
    with pytest.raises(DataError, match="is no list of numbers" if "n" in text else r"an array of \[1\]"):
        read(csv(tmp_path, [text] * 4), **BINS)  # the control: of bins they are numbers, or none


def test_classes_of_bases_are_numbered_by_value(tmp_path: Path) -> None:
    numbers = np.tile(np.array([0, 2, 10, 100, 3, -1], dtype=np.int16), (4, 2))
    found = read(unlabelled(tmp_path, numbers), task="per_base")
    assert found.classes == ["0", "2", "3", "10", "100"]
    assert arrays(found)[BASES[0].encode()].tolist() == [0, 1, 3, 4, 2, IGNORE] * 2


@pytest.mark.parametrize(("number", "dtype", "said"), [
    (-100, np.int64, "-100, which is no class: write"), (-2, np.int8, "-2, which is no class: write"),
    (255, np.uint8, "255, which is no class but what -1 becomes in an array of uint8: write"),
    (2**64 - 1, np.uint64, "18446744073709551615, which is no class but what -1 becomes in an array of uint64: write"),
    (2**63, np.uint64, "9223372036854775808, which is no class: write")])
def test_numbers_that_are_no_classes_are_refused(tmp_path: Path, number: int, dtype: type, said: str) -> None:
    numbers = np.tile(np.array([0, 1, 2], dtype=dtype), (4, 4))
    numbers[:, 4] = number
    with pytest.raises(DataError, match=rf"rows.npy: row \d: base 5 has the number {said}"):
        read(unlabelled(tmp_path, numbers), task="per_base")
    np.save(tmp_path / "test.npy", numbers)
    (tmp_path / "test.csv").write_bytes((tmp_path / "rows.csv").read_bytes())
    with pytest.raises(DataError, match=rf"test.npy: row 1: base 5 has the number {said}"):
        read(unlabelled(tmp_path, numbers[:, [0, 1, 2] * 4]), task="per_base", test=str(tmp_path / "test.csv"))


@pytest.mark.parametrize(("number", "dtype"), [(255, np.int16), (254, np.uint8), (1, np.bool_)])
def test_numbers_that_are_classes(tmp_path: Path, number: int, dtype: type) -> None:
    numbers = np.tile(np.array([0, number], dtype=dtype), (4, 6))
    assert read(unlabelled(tmp_path, numbers), task="per_base").classes == ["0", str(number)]


def test_pairs_are_a_map_or_its_upper_triangle(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((4, 3, 3)).astype(np.float32)
    keys = dict(task="pairs", bin_size=4, diagonals=1)
    whole = arrays(read(unlabelled(tmp_path, maps), **keys))
    upper = np.stack([one[np.triu_indices(3, 1)] for one in maps])
    assert same(arrays(read(unlabelled(tmp_path, upper, "upper"), **keys)), whole)
    one = whole[BASES[0].encode()]
    assert np.array_equal(one[np.triu_indices(3, 1)], upper[0])
    assert np.isnan(one[np.tril_indices(3)]).all(), "what is no pair is not scored"


def test_bins_that_are_cut_off_are_not_scored(tmp_path: Path) -> None:
    found = arrays(read(unlabelled(tmp_path, TRACKS[:, :1]), bins_cut=1, **BINS))
    for number, bases in enumerate(BASES):
        values = found[bases.encode()]
        assert np.isnan(values[[0, 2]]).all()
        assert np.array_equal(values[1], TRACKS[number, 0])


def test_another_value_is_another_run(tmp_path: Path) -> None:
    other = TRACKS.copy()
    other[2, 1, 1] += 1
    first, same_again = (read(unlabelled(tmp_path, TRACKS), **BINS).digest() for _ in range(2))
    assert first == same_again != read(unlabelled(tmp_path, other), **BINS).digest()


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64, np.bool_])
def test_every_label_counts_in_the_digest(tmp_path: Path, dtype: type) -> None:
    labels = np.zeros((1 << 17, 2), dtype=dtype)
    np.save(tmp_path / "labels.npy", labels)
    first = Values(labels, "").digest()
    assert Values(tmp_path / "labels.npy", "").digest() == first, "the control"
    assert Values(np.asfortranarray(labels), "").digest() == first, "the control: however it lies in memory"
    found = {first, Values(labels.reshape(-1), "").digest()}
    for place in ((1, 0), (77_777, 1), (-1, -1)):
        labels[:] = 0
        labels[place] = 1
        found.add(Values(labels, "").digest())
    assert len(found) == 5


def test_the_digest_of_few_labels_is_that_of_earlier_versions() -> None:
    assert Values(np.arange(6, dtype=np.float32).reshape(2, 3), "").digest().hex() == "c7c2e1f17dfc47016ae125a08fe98997"
    assert len({Values(np.zeros(shape), "").digest() for shape in ((0,), (0, 3), (1,))}) == 3


@pytest.mark.parametrize(("array", "keys", "said"), [
    (TRACKS[:3], BINS, r"rows.npy: is an array of \[3, 3, 2\], and .*rows.csv has 4 rows"),
    (TRACKS[:, :2], BINS, r"rows.npy: row \d: the labels are an array of \[2, 2\], and a sequence of 12 bases has "
                          r"labels of \[3, 2\]"),
    (TRACKS, dict(task="binned", bin_size=5), "row .: 12 bases are not whole bins of 5"),
    (TRACKS, dict(BINS, bins_cut=2), "at least one more than the 2 cut off"),
    (TRACKS, dict(task="pairs", bin_size=4, diagonals=1), r"has labels of \[3, 3\] or \[3\]"),
    (TRACKS, dict(task="pairs", bin_size=4, diagonals=3), "have no pair that is 3 apart"),
    (TRACKS[:, :, 0], dict(task="per_base"), r"an array of \[3\], and a sequence of 12 bases has labels of \[12\]"),
    (np.zeros((4, 12), np.int64), dict(task="per_base"), "bases of 1 class"),
    (np.zeros((4, 12)), dict(task="per_base"), "numbers of classes, and the array is of float64"),
    (np.array([["a"] * 3] * 4), BINS, "does not hold one array of numbers"),
])
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, array: np.ndarray, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(unlabelled(tmp_path, array), **keys)


@pytest.mark.parametrize(("labels", "keys", "said"), [
    (["1 2 3", "1 2", "1 2 3", "1 2 3"], BINS, r"table.csv: line 3: the labels are an array of \[2\]"),
    (["1 2 3", "1 x 3", "1 2 3", "1 2 3"], BINS, "line 3: the label '1 x 3' is no list of numbers"),
    (["1 2 3", "gone.npy", "1 2 3", "1 2 3"], BINS, "line 3: .*gone.npy: cannot be read as an array"),
    (["1 2 3", "", "1 2 3", "1 2 3"], BINS, "line 3: has no label"),
    (["iiiiiieeeeee", "iii", "iiiiiieeeeee", "iiiiiieeeeee"], dict(task="per_base"),
     "line 3: has 3 letters of labels and 12 bases"),
    (["iiiiiieeeeee", "iii eeeeeeee", "iiiiiieeeeee", "iiiiiieeeeee"], dict(task="per_base"), "line 3: ' ' among"),
])
def test_texts_that_do_not_fit_are_refused(tmp_path: Path, labels: list[str], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(csv(tmp_path, labels), **keys)


def test_values_that_cannot_be_are_refused_when_they_are_read(tmp_path: Path) -> None:
    for value, keys, said in ((np.inf, BINS, "is inf"), (-1, dict(BINS, loss="poisson"), "0 or more")):
        array = TRACKS.copy()
        array[1, 2, 0] = value
        with pytest.raises(DataError, match=rf"rows.npy: row 2: the label at \[2, 0\] .*{said}|{said}"):
            arrays(read(unlabelled(tmp_path, array), **keys))


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = unlabelled(tmp_path, TRACKS)
    whole = (tmp_path / "rows.npy").read_bytes()
    huge = whole.replace(b"(4, 3, 2), }".ljust(24), b"(10000000000000000000,)}")
    assert len(huge) == len(whole)
    for damaged in (whole[:-8], whole[:20], b"", b"not an array" * 9, b"PK\x03\x04 no zip", huge):
        (tmp_path / "rows.npy").write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows.npy: cannot be read as an array"):
            read(path, **BINS)
