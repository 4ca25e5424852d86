"""What stands beside labels of places: k-mers around a place say what they can, and no more; and the mean, which no
base is looked at for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.labelled import read_labelled
from hyena_dist.tasks.place_baselines import Sequence, place_baselines

BINS, SIZE = 12, 20


def found(directory: Path, task: str, *, both: bool = False, **section: Any) -> dict[str, dict[str, Any]]:
    tune = FinetuneSection(table=str(directory), task=task, bin_size=SIZE, diagonals=1, **section)
    return place_baselines(read_labelled(tune, seed=0, most=BINS * SIZE), both_strands=both, seed=0)


def table(directory: Path, task: str, *, shuffled: bool = False) -> Path:
    """Bins with their share of G and C, of their own and of the next one, bases with a class that the base three before
    decides, and pairs that are alike, less so the farther they are apart."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 30), ("dev", 10), ("test", 20)):
        odds = rng.choice([0.2, 0.4, 0.8], (count, BINS, 1))
        strong = rng.random((count, BINS, SIZE)) < odds
        bases = np.where(strong, rng.choice(list("GC"), strong.shape), rng.choice(list("AT"), strong.shape))
        share, lines = strong.mean(2), ["sequence,label"]
        tracks = np.stack([share, np.roll(share, -1, 1)], 2)
        if shuffled:
            tracks = rng.permuted(tracks, axis=1)
        tracks[:, -1, 1] = np.nan
        for row in range(count):
            sequence, label = "".join(bases[row].flat), ""
            if task == "per_base":
                label = "..." + "".join("sw"[base in "AT"] for base in sequence[:-3])
            elif task == "pairs":
                i, j = np.triu_indices(BINS, 1)
                label = " ".join(map(str, share[row][i] * share[row][j] + 1 / (j - i)))
            lines.append(f"{sequence},{label}")
        if task == "binned":
            np.save(directory / f"{name}.npy", tracks)
            lines = [line.split(",")[0] for line in lines]
        (directory / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize("both", [False, True])
def test_bins(tmp_path: Path, both: bool) -> None:
    beside = found(table(tmp_path / "table", "binned"), "binned", both=both)
    scores = {name: one["scores"]["test"] for name, one in beside.items()}
    assert scores["kmers"]["pearson"] > 0.9
    assert scores["kmers"]["mean_squared_error"] < 0.2 * scores["mean"]["mean_squared_error"]
    assert scores["mean"]["pearson"] == 0
    assert beside["kmers"]["k"] in (2, 3, 4)
    assert beside["kmers"]["scores"].keys() == {"valid", "test"}


def test_bins_of_which_the_bases_say_nothing(tmp_path: Path) -> None:
    scores = found(table(tmp_path / "table", "binned", shuffled=True), "binned")["kmers"]["scores"]
    assert abs(scores["test"]["pearson"]) < 0.3, "the control"


def test_bases(tmp_path: Path) -> None:
    beside = found(table(tmp_path / "table", "per_base"), "per_base")
    assert beside["kmers"]["scores"]["test"]["mcc"] > 0.95
    assert beside["mean"]["scores"]["test"]["mcc"] == 0
    assert 0.5 < beside["mean"]["scores"]["test"]["accuracy"] < 0.6


def test_bases_of_which_one_class_alone_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = table(tmp_path / "table", "per_base")
    lines = (directory / "train.csv").read_text("utf-8").splitlines()
    rare = [line.split(",")[0] + "," + "s" * (BINS * SIZE - 1) + "w" for line in lines[1:]]
    (directory / "train.csv").write_text("\n".join([lines[0], *rare]) + "\n", encoding="utf-8")
    monkeypatch.setattr("hyena_dist.tasks.place_baselines.SAMPLED", 1)
    scores = found(directory, "per_base")
    assert scores["kmers"]["scores"]["test"] == scores["mean"]["scores"]["test"]


def test_pairs(tmp_path: Path) -> None:
    beside = found(table(tmp_path / "table", "pairs"), "pairs")
    kmers, mean = (beside[name]["scores"]["test"] for name in ("kmers", "mean"))
    assert kmers["stratum_pearson"] > 0.8
    assert kmers["pearson"] > mean["pearson"] > 0.8, "distance alone says much, and nothing within a distance"
    assert mean["stratum_pearson"] == 0


def test_what_is_seen_of_a_bin(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sequence\n" + "A" * 16 + "CG" * 8 + "N" * 16 + "\n")
    np.save(tmp_path / "train.npy", np.arange(3.0)[None])
    (tmp_path / "dev.csv").write_text("sequence\n" + "AC" * 24 + "\n")
    np.save(tmp_path / "dev.npy", np.arange(3.0)[None])
    labelled = read_labelled(FinetuneSection(table=str(tmp_path), task="binned", bin_size=16), seed=0, most=48)
    own, left, right = Sequence(labelled, "train", 0, False).seen(np.arange(3), 2).reshape(3, 3, 16).transpose(1, 0, 2)
    aa, cg, gc = 0, 1 + 4 * 2, 2 + 4 * 1
    assert own[0, aa] == 1
    assert (own[1, cg], own[1, gc], own[1].sum()) == (8 / 15, 7 / 15, 1)
    assert own[2].sum() == 0, "a letter that is no base is in no k-mer"
    assert np.array_equal(left, np.stack([np.zeros(16), own[0], own[1]]))
    assert np.array_equal(right, np.stack([own[1], own[2], np.zeros(16)]))
    both = Sequence(labelled, "train", 0, True).seen(np.arange(3), 2).reshape(3, 3, 16)[:, 0]
    assert (both[0, aa], both[0, 15]) == (0.5, 0.5), "of the other strand: TT"
    assert both[1, cg] == 8 / 15, "which is its own reverse complement"


def test_bins_shorter_than_a_word_have_none(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sequence,label\nACGTAC,1 2 3\n", encoding="utf-8")
    (tmp_path / "dev.csv").write_text("sequence,label\nACGTCC,1 2 4\n", encoding="utf-8")
    tune = FinetuneSection(table=str(tmp_path), task="pairs", bin_size=2, diagonals=1)
    labelled = read_labelled(tune, seed=0, most=6)
    one = Sequence(labelled, "train", 0, False)
    assert one.seen(one.known, 3).sum() == 0
    assert one.seen(one.known, 2).sum() == 7, "the control: two of each pair, and one that AC and AC have in common"
    assert place_baselines(labelled, both_strands=False, seed=0)["mean"]["scores"]["valid"]["mean_squared_error"] > 0
