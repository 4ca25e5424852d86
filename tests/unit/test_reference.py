"""A reference in memory: where on its chromosomes each sequence lies, and how much memory it takes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.data import blocks
from hyena_dist.data.errors import DataError
from hyena_dist.data.reference import read_reference
from hyena_dist.data.tokenizer import encode

RANDOM = np.random.default_rng(11)


def bases(count: int) -> str:
    return "".join(RANDOM.choice(list("ACGT"), count))


@pytest.mark.parametrize("name", ["Y", "chrY"])
def test_the_y_of_ensembl_is_a_whole_chromosome(name: str, tmp_path: Path) -> None:
    """It is written at full length, with N where it is alike to X, and its header has the place of the rest alone."""
    text, path = "N" * 500 + bases(2000) + "N" * 300, tmp_path / "ens.fa"
    path.write_text(f">1 dna:chromosome chromosome:GRCh38:1:1:900:1 REF\n{bases(900)}\n"
                    f">{name} dna:chromosome chromosome:GRCh38:Y:501:2500:1 REF\n{text}\n")
    found = read_reference(path)
    assert [each.place[:3] for stretches in found.stretches.values() for each in stretches] == [("1", 0, 900),
                                                                                              ("Y", 0, 2800)]
    stretch = found.stretches["Y"][0]
    assert np.array_equal(found.ids[stretch.begin : stretch.end], encode(text))
    assert found.assembly == "GRCh38"


@pytest.mark.parametrize("header", ["Y dna:chromosome chromosome:GRCh38:Y:501:2801:1", "s dna:chromosome "
                                    "chromosome:GRCh38:Y:501:2500:1", "s range=chrY:501-2500"])
def test_other_places_that_do_not_fit_are_refused(header: str, tmp_path: Path) -> None:
    """The control: the place reaches past the bases, or the sequence is called otherwise than the chromosome."""
    (tmp_path / "r.fa").write_text(f">{header}\n{bases(2800)}\n")
    with pytest.raises(DataError, match="has 2,800 bases, and its header says .*: give a file of this sequence alone"):
        read_reference(tmp_path / "r.fa")


def test_a_slice_called_as_its_chromosome_stays_a_slice(tmp_path: Path) -> None:
    (tmp_path / "r.fa").write_text(f">Y dna:chromosome chromosome:GRCh38:Y:501:2500:1\n{bases(2000)}\n")
    assert read_reference(tmp_path / "r.fa").stretches["Y"][0].place[:3] == ("Y", 500, 2500)


def test_a_reference_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are joined at the end take twice the bases."""
    monkeypatch.setattr(blocks, "_BLOCK", 1 << 16)
    count, each = 40, 100_000
    (tmp_path / "r.fa").write_text("".join(f">{number}\n{'ACGT' * (each // 4)}\n" for number in range(count)))
    tracemalloc.start()
    found = read_reference(tmp_path / "r.fa")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak of {peak:,} bytes for {found.ids.size:,}")
    assert found.ids.size == count * each
    assert peak < 1.5 * count * each


def test_names_that_do_not_meet_are_told_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "r.fa").write_text("".join(f">{name}\nACGT\n" for name in "abcde"))
    reference = read_reference(tmp_path / "r.fa")
    assert reference.against({"x": 1, "y": 1200, "z": 1, "w": 1}) == (
        "the file has y (1,200), x (1), z (1), 1 more, the reference a, b, c, 2 more")
