"""The losses and the metrics of labels of places: what is not known moves nothing, and nothing that is wrong is left
out of a mean."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data import scale
from hyena_dist.data.errors import DataError
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.train.answers import Drawn
from hyena_dist.train.place_answers import BinAnswers, PairAnswers
from hyena_dist.train.predictions import scores_of

COUNT, BINS, SIZE = 20, 5, 4


def table(directory: Path, labels: np.ndarray) -> FinetuneSection:
    """Sequences whose labels [COUNT, BINS, ...] are those of their bins, or of pairs of these."""
    rng = np.random.default_rng(0)
    np.save(directory / "table.npy", labels)
    rows = ["".join(rng.choice(list("ACGT"), BINS * SIZE)) for _ in range(COUNT)]
    (directory / "table.csv").write_text("\n".join(["sequence", *rows]) + "\n", encoding="utf-8")
    return FinetuneSection(table=str(directory / "table.csv"), task="binned", bin_size=SIZE)


def read(section: FinetuneSection) -> Labelled:
    return read_labelled(section, seed=0, most=BINS * SIZE)


def answers(section: FinetuneSection, labelled: Labelled) -> BinAnswers:
    model: Any = SimpleNamespace(bin_size=SIZE)
    return (PairAnswers if section.task == "pairs" else BinAnswers)(labelled, section, model)


def gradient(section: FinetuneSection, *, of_answers: float = 0.5) -> tuple[float, torch.Tensor]:
    """Loss of the first training sequence, whose answers are all the same, and its gradient."""
    labelled = read(section)
    task = answers(section, labelled)
    targets = task.of("train", [Drawn(0, False)], BINS)
    found = torch.full(targets.shape, of_answers, requires_grad=True)
    loss = task.losses(found, targets).sum()
    loss.backward()
    assert found.grad is not None
    return float(loss.detach()), found.grad


def tracks(**of: Any) -> np.ndarray:
    """[COUNT, BINS, 2] counts."""
    return np.random.default_rng(1).poisson(3.0, (COUNT, BINS, 2)).astype(of.get("dtype", np.float32))


@pytest.mark.parametrize("loss", ["squared", "poisson"])
@pytest.mark.parametrize("unknown", ["a track", "a bin", "nothing"])
def test_what_is_not_known_gives_no_gradient(tmp_path: Path, loss: str, unknown: str) -> None:
    labels = tracks()
    where = {"a track": np.s_[:, :, 1], "a bin": np.s_[:, 2, :], "nothing": np.s_[:, :0]}[unknown]
    labels[where] = np.nan
    found, grad = gradient(FinetuneSection(**{**vars(table(tmp_path, labels)), "loss": loss}))
    assert np.isfinite(found)
    assert found > 0
    assert grad.isfinite().all()
    assert np.array_equal(grad[0].numpy() != 0, ~np.isnan(labels[0])), "of what is known, and of nothing else"


def test_what_is_said_of_the_unknown_is_not_looked_at(tmp_path: Path) -> None:
    labels = tracks()
    labels[:, 2] = np.nan
    section = table(tmp_path, labels)
    task = answers(section, read(section))
    targets = task.of("train", [Drawn(0, False)], BINS)
    for place, finite in ((2, True), (1, False)):  # the second is the control
        said = torch.zeros(targets.shape)
        said[0, place] = torch.inf
        said.requires_grad_()
        task.losses(said, targets).sum().backward()
        assert said.grad is not None
        assert bool(said.grad.isfinite().all()) is finite


def test_a_map_without_some_of_its_pairs(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).random((COUNT, BINS, BINS)).astype(np.float32)
    labels[:, 0, 3] = np.nan
    section = FinetuneSection(**{**vars(table(tmp_path, labels)), "task": "pairs", "diagonals": 1})
    grad = gradient(section)[1][0]
    wanted = np.triu(np.ones((BINS, BINS), dtype=bool), 1)
    wanted[0, 3] = False
    assert np.array_equal(grad.numpy() != 0, wanted)


def test_a_track_without_labels_is_said(tmp_path: Path) -> None:
    labels = tracks()
    assert read(table(tmp_path, labels)).notes == [], "the control"
    labels[:, :, 1] = np.nan
    assert read(table(tmp_path, labels)).notes == [
        "1 of 2 tracks have no label in train, and nothing is learnt of them: those of number 1, counted from 0"]


def test_labels_of_which_none_is_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="finetune.table has no label in train that is known"):
        read(table(tmp_path, tracks() * np.nan))
    section = table(tmp_path, tracks())
    (tmp_path / "test.csv").write_bytes((tmp_path / "table.csv").read_bytes())
    for task, labels in (("binned", tracks() * np.nan), ("per_base", np.full((COUNT, BINS * SIZE), -1))):
        train = tracks() if task == "binned" else np.arange(COUNT * BINS * SIZE).reshape(COUNT, -1) % 2
        np.save(tmp_path / "table.npy", train)
        np.save(tmp_path / "test.npy", labels)
        judged = FinetuneSection(**{**vars(section), "task": task, "test": str(tmp_path / "test.csv")})
        with pytest.raises(DataError, match="has sequences of test and no label of test that is known"):
            read(judged)
        np.save(tmp_path / "test.npy", train)
        read(judged)  # the control


def test_the_scale_is_that_of_all_labels_that_are_known(tmp_path: Path) -> None:
    labels = 1e4 + tracks(dtype=np.float64)
    labels[::3, 1:, 0] = np.nan
    labelled = read(table(tmp_path, labels))
    train = np.stack([labelled.at_places("train", n) for n in range(len(labelled.splits["train"]))]).reshape(-1, 2)
    assert labelled.scale is not None
    assert np.allclose(labelled.scale.mean, np.nanmean(train.astype(np.float64), 0), rtol=1e-12)
    assert np.allclose(labelled.scale.deviation, np.nanstd(train.astype(np.float64), 0), rtol=1e-9)


def test_a_track_that_few_sequences_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((100, 3, 2))
    rows[:, :, 1] = np.nan
    rows[37, 1, 1] = 7
    monkeypatch.setattr(scale, "_SAMPLED", 10)
    assert scale.scale_of(lambda row: rows[row], 100, 2)[0].mean == [0, 7]
    rows[40, 1, 1] = 5
    assert scale.scale_of(lambda row: rows[row], 100, 2)[0].mean == [0, 5], "the control: the sample is enough"


@pytest.mark.parametrize("value", [0.1, 1e7 / 3, 0.0, 1e-40])
def test_labels_that_are_all_the_same_are_learnt_as_they_are(tmp_path: Path, value: float) -> None:
    """Their deviation is no more than rounding, by which nothing may be divided."""
    section = table(tmp_path, np.full((COUNT, BINS, 1), value, dtype=np.float32))
    assert read(section).scale.deviation == [1.0]
    loss, grad = gradient(section)
    assert loss == pytest.approx(BINS * 0.25)
    assert grad.isfinite().all()


def judged(section: FinetuneSection, said: Any) -> Any:
    """The tally of valid, of answers in units of the labels that `said` makes of them."""
    labelled = read(section)
    task = answers(section, labelled)
    tally = task.tally("valid")
    mean, deviation = task._scale(torch.zeros(1, dtype=torch.float64))
    for number in range(len(labelled.splits["valid"])):
        labels = torch.from_numpy(labelled.at_places("valid", number)).double()
        tally.add([number], ((said(labels) - mean) / deviation)[None])
    return tally


def right(labels: torch.Tensor) -> torch.Tensor:
    return labels.clone()


def one_track_constant(labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([labels[:, 0], torch.full_like(labels[:, 1], 0.3)], 1)


def both_constant(labels: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.3, 8.0], dtype=torch.float64).expand(labels.shape)


@pytest.mark.parametrize(("said", "pearson", "collapsed"), [
    (right, 1.0, False), (one_track_constant, 0.5, False), (both_constant, 0.0, True)])
def test_a_track_of_one_answer_counts_as_0(tmp_path: Path, said: Any, pearson: float, collapsed: bool) -> None:
    tally = judged(table(tmp_path, tracks()), said)
    assert tally.scores()["pearson"] == pytest.approx(pearson)
    assert tally.collapsed is collapsed, "tracks that have one answer each say the same of everything"
    assert tally.notes() == []


@pytest.mark.parametrize("label", [2.0, np.nan])
def test_a_track_of_one_label_is_left_out_and_said(tmp_path: Path, label: float) -> None:
    labels = tracks()
    labels[:, :, 1] = label
    tally = judged(table(tmp_path, labels), lambda labels: labels.nan_to_num(1.0))
    assert tally.scores()["pearson"] == pytest.approx(1)
    assert tally.notes() == ["1 of 2 tracks have labels in valid that are all the same, or none: no correlation of "
                             "theirs is in a mean"]
    tally = judged(table(tmp_path, labels * 0), lambda labels: labels.nan_to_num(1.0))
    assert tally.scores()["pearson"] is None, "there is none to take a mean of"


def test_a_distance_of_one_answer_counts_as_0(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).random((COUNT, BINS, BINS)).astype(np.float32)
    section = FinetuneSection(**{**vars(table(tmp_path, labels)), "task": "pairs", "diagonals": 1})

    def nearest_constant(labels: torch.Tensor) -> torch.Tensor:
        found = labels.nan_to_num(0.0)
        found[range(BINS - 1), range(1, BINS)] = 0.5
        return found

    pairs = BINS * (BINS - 1) // 2
    assert judged(section, lambda labels: labels.nan_to_num(0.0)).scores()["stratum_pearson"] == pytest.approx(1)
    tally = judged(section, nearest_constant)
    assert tally.scores()["stratum_pearson"] == pytest.approx(1 - (BINS - 1) / pairs), "weighted by the places"
    assert (tally.notes(), tally.collapsed) == ([], False), "no pair is on the diagonal, which is none of the distances"
    labels[:, range(BINS - 1), range(1, BINS)] = 0.5
    np.save(tmp_path / "table.npy", labels)
    tally = judged(section, lambda labels: labels.nan_to_num(0.0))
    assert tally.scores()["stratum_pearson"] == pytest.approx(1)
    assert tally.notes()[0].startswith("1 of 4 distances have labels in valid that are all the same")
    tally = judged(section, lambda labels: torch.full_like(labels, 0.5))
    assert (tally.scores()["pearson"], tally.scores()["stratum_pearson"], tally.collapsed) == (0, 0, True)


def test_a_seed_that_says_one_number_of_everything_counts_as_0() -> None:
    """So it lowers the mean over the seeds, in which what has no value is left out."""
    targets = np.arange(4.0)
    for said, wanted in ((np.full((4, 1), 2.5), 0), (targets[:, None], 1)):
        found = scores_of("regression", said, targets)
        assert (found["pearson"], found["spearman"]) == (pytest.approx(wanted), pytest.approx(wanted))
    assert scores_of("regression", targets[:, None], targets * 0)["pearson"] is None
