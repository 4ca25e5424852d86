"""How good answers for places are: sums over the places of all sequences, from which the metrics follow. Answers for
every base of a test set would not fit into memory."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hyena_dist.data.labelled import Labelled
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.answers import Judgement, summed

Losses = Callable[[Tensor, Tensor], Tensor]


class InUnits(Protocol):
    """The answers that are numbers."""

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Of each target, 0 where it is unknown."""

    def in_units(self, answers: Tensor) -> Tensor:
        """In the units of the labels."""


class _Tally:
    """Sums, and a line for each sequence: how many of its places were scored, their mean loss, and one metric."""

    metric = ""
    """Of each sequence, in its line."""

    def __init__(self, labelled: Labelled, split: str, shape: Sequence[int]) -> None:
        self.labelled, self.split = labelled, split
        self.sums = torch.zeros(*shape, dtype=torch.float64)
        self.rows = torch.zeros(len(labelled.splits[split]), 3, dtype=torch.float64)

    def targets(self, number: int) -> Tensor:
        """[N, ...] of a sequence, on its forward strand."""
        return torch.from_numpy(self.labelled.at_places(self.split, number))

    def reduce(self, data: Axis) -> None:
        self.sums, self.rows = summed(self.sums, data), summed(self.rows, data)

    def loss(self) -> tuple[float, float]:
        count = float(self.rows[:, 0].sum())
        return (float(self.rows[:, 1].sum()) / count if count else math.nan), count

    def judgement(self) -> Judgement:
        return self  # type: ignore[return-value]

    def notes(self) -> list[str]:
        """As of `Judgement`."""
        return []

    def lines(self) -> list[str]:
        found = [f"name\tplaces\tloss\t{self.metric}"]
        for example, (count, loss, value) in zip(self.labelled.splits[self.split], self.rows.tolist(), strict=True):
            mean = loss / count if count else math.nan
            found.append(f"{example.name}\t{count:.0f}\t{mean:.6g}\t{value:.6g}")
        return found


class ClassTally(_Tally):
    """Counts of each class by what was said."""

    metric = "accuracy"

    def __init__(self, labelled: Labelled, split: str, losses: Losses) -> None:
        super().__init__(labelled, split, (labelled.outputs, labelled.outputs))
        self._losses = losses

    def add(self, numbers: Sequence[int], answers: Tensor) -> None:
        for number, row in zip(numbers, answers, strict=True):
            targets = self.targets(number)
            row, known = row[: len(targets)], targets >= 0
            said = row.argmax(-1)[known]
            cells = targets[known] * len(self.sums) + said
            self.sums += torch.bincount(cells, minlength=self.sums.numel()).view_as(self.sums)
            losses = self._losses(row[None], targets[None]).sum()
            right = (said == targets[known]).double().mean() if len(said) else torch.tensor(math.nan)
            self.rows[number] = torch.tensor([len(said), losses, right])

    @property
    def collapsed(self) -> bool:
        return int((self.sums.sum(0) > 0).sum()) <= 1

    def scores(self) -> dict[str, float | None]:
        """As scikit-learn defines them, of the counts."""
        counts, total = self.sums, float(self.sums.sum())
        if not total:
            return {"accuracy": None, "f1_macro": None, "mcc": None}
        true, said, right = counts.sum(1), counts.sum(0), counts.diag()
        there = (true + said) > 0
        square = (total**2 - said.square().sum()) * (total**2 - true.square().sum())
        mcc = float((right.sum() * total - (true * said).sum()) / square.sqrt()) if square > 0 else 0.0
        return {"accuracy": float(right.sum()) / total, "f1_macro": float((2 * right / (true + said))[there].mean()),
                "mcc": mcc if int((true > 0).sum()) > 1 else None}


class NumberTally(_Tally):
    """Moments of labels and answers, of each group of places: of a track, or of the pairs that are so far apart.

    Args:
        groups: the group of each place of a sequence of so many bins, in the shape of its targets.
        count: of groups.
        center: near the mean of the labels, which is taken off before squares are summed.
        strata: whether groups are distances, whose correlations are averaged by their places, as in HiCRep.
    """

    metric = "pearson"

    def __init__(self, labelled: Labelled, split: str, task: InUnits, *, groups: Callable[[int], Tensor], count: int,
                 center: Tensor, strata: bool = False) -> None:
        super().__init__(labelled, split, (count, 6))
        self._task, self._groups, self._center, self._strata = task, groups, center, strata
        self._squares = 0.0

    def add(self, numbers: Sequence[int], answers: Tensor) -> None:
        for number, row in zip(numbers, answers, strict=True):
            targets = self.targets(number)
            bins = len(targets)
            row = row[:bins] if not self._strata else row[:bins, :bins]
            known = ~targets.isnan()
            losses = self._task.losses(row[None], targets[None]).sum()
            center = self._center.expand(targets.shape) if not self._strata else self._center
            x, y = self._task.in_units(row) - center, targets.double() - center
            x, y, group = x[known], y[known], self._groups(bins)[known]
            moments = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], 1)
            self.sums.index_add_(0, group, moments)
            value = _pearson(moments.sum(0)[None])[0] if len(x) else torch.tensor(math.nan)
            self.rows[number] = torch.tensor([len(x), losses, value])

    @property
    def collapsed(self) -> bool:
        """Whether every track has one answer for all of its places, or all pairs have one."""
        n, x, _, xx, *_ = self._of_all.unbind(-1) if self._strata else self.sums.unbind(-1)
        return not bool(_varies(n, x, xx).any())

    @property
    def _of_all(self) -> Tensor:
        return self.sums.sum(0, keepdim=True)

    def scores(self) -> dict[str, float | None]:
        """Correlations are means over groups whose labels differ; of one whose answers do not it is 0, and counts."""
        n, _, _, xx, yy, xy = self.sums.sum(0)
        squared = _number((xx + yy - 2 * xy) / n)
        found, weight = _pearson(self.sums), self.sums[:, 0]
        there = ~found.isnan()
        if not self._strata:
            return {"pearson": _number(found[there].mean()), "mean_squared_error": squared}
        stratum = (found * weight)[there].sum() / weight[there].sum()
        return {"pearson": _number(_pearson(self._of_all)[0]), "stratum_pearson": _number(stratum),
                "mean_squared_error": squared}

    def notes(self) -> list[str]:
        known = self.sums[:, 0] > 0
        same = int((_pearson(self.sums).isnan() & (known | (not self._strata))).sum())
        what, count = ("distances", int(known.sum())) if self._strata else ("tracks", len(known))
        return [f"{same:,} of {count:,} {what} have labels in {self.split} that are all the same, or none: no "
                "correlation of theirs is in a mean"] * bool(same)


def bin_tally(labelled: Labelled, split: str, task: InUnits, center: Tensor) -> NumberTally:
    """An empty one of the numbers of bins, whose groups are the tracks; the arguments as of `NumberTally`."""
    tracks = torch.arange(labelled.outputs)
    return NumberTally(labelled, split, task, groups=lambda bins: tracks.expand(bins, -1), count=len(tracks),
                       center=center)


def pair_tally(labelled: Labelled, split: str, task: InUnits, center: Tensor) -> NumberTally:
    """An empty one of the numbers of pairs of bins, whose groups are their distances."""
    assert labelled.places is not None
    most = max(example.length for example in labelled.splits[split]) // labelled.places.bin_size

    def apart(bins: int) -> Tensor:
        place = torch.arange(bins)
        return (place - place[:, None]).clamp(min=0)

    return NumberTally(labelled, split, task, groups=apart, count=most, center=center, strata=True)


def _pearson(sums: Tensor) -> Tensor:
    """[G, 6] moments -> [G]; 0 where only the answers are all the same, NaN where the labels are or there is none."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    found = (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).sqrt()
    return torch.where(_varies(n, y, yy), torch.where(_varies(n, x, xx), found, 0), math.nan)


def _varies(n: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """[G], whether not all numbers of a group are the same, by how many there are, their sum and that of their
    squares."""
    return n * squares - total * total > 1e-12 * n * squares


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
