"""What a fine-tuned model answers, and how good its answers are: all that differs between heads. An `Answers` makes the
targets, the loss and the measure; the objective around it (`train/finetuning.py`) knows none of them.

Here stand the protocol and the answers of whole sequences; those of bases, bins and pairs are in `place_answers.py`.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.data.labelled import Labelled
from hyena_dist.data.scale import Scale
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.predictions import METRICS, Predictions, scores_of


class Drawn(NamedTuple):
    """A sequence of a split as it is shown once."""

    number: int
    reverse: bool
    """Whether it is its other strand."""
    epoch: int = -1
    """Of training."""


class Judgement(Protocol):
    """What a model says of a split, once all is known."""

    @property
    def split(self) -> str:
        """Of which it is."""

    @property
    def collapsed(self) -> bool:
        """Whether it says the same of everything."""

    def scores(self) -> dict[str, float | None]:
        """Every metric; None where it has no value."""

    def notes(self) -> list[str]:
        """What its metrics leave out, a line each."""

    def lines(self) -> list[str]:
        """A table of tab-separated values, a line for each sequence."""


class Tally(Protocol):
    """Collects the answers of a split, batch by batch, on every rank."""

    def add(self, numbers: Sequence[int], answers: Tensor) -> None:
        """Answers of whole sequences, as `Answers.whole` gives them, and which sequences they are of."""

    def reduce(self, data: Axis) -> None:
        """Add up what the data ranks have; after it nothing more is added."""

    def loss(self) -> tuple[float, float]:
        """The mean over all that is scored, and how much that is."""

    def scores(self) -> dict[str, float | None]:
        """Every metric of what was added; None where it has no value."""

    def judgement(self) -> Judgement:
        """Of the whole split, all of which was added."""


class Answers(Protocol):
    """One kind of answer."""

    metrics: Collection[str]
    """Names of what a `Judgement` scores."""
    scored_name: str
    """What the loss is the mean of, in the plural."""
    scale: Scale | None
    """By which numbers are learnt; None: the labels are classes."""

    def targets(self, split: str, drawn: Sequence[Drawn], width: int) -> Tensor:
        """This rank's, as `loss` takes them, where the batch is padded to `width` tokens."""

    def scored(self, split: str, drawn: Sequence[Drawn], width: int) -> float:
        """How much `loss` is the sum of on this context rank."""

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Summed, 0-dim: the part that this context rank counts, the same on every tensor rank."""

    def whole(self, answers: Tensor, width: int) -> Tensor:
        """What the model gave on each rank -> the answers of whole sequences, float64 and the same on every context and
        tensor rank. Collective."""

    def turned(self, answers: Tensor, lengths: Sequence[int]) -> Tensor:
        """Whole answers of the other strands, in the order of these."""

    def tally(self, split: str) -> Tally:
        """An empty one."""

    def said(self, row: Tensor, bases: int) -> np.ndarray:
        """What is said of one sequence of so many bases, of its row of the whole answers: logits, or numbers in the
        units of the labels; float64, in the shape of its labels, of classes with one more axis for their logits."""


class WholeAnswers:
    """One answer for each sequence: a class, several of n, or a number."""

    scored_name = "sequences"

    def __init__(self, labelled: Labelled, context: Axis) -> None:
        self._labelled = labelled
        self.metrics: Collection[str] = METRICS[labelled.task]
        self._share = 1 / context.size
        """Of the loss that a context rank counts: each has the same answers."""
        self._targets: dict[str, np.ndarray] = {}
        self.scale = None
        if labelled.task == "regression":
            self.scale = labelled.scale or _scale_of(labelled.targets("train"))
        (mean,), (deviation,) = self.scale or ([0.0], [1.0])
        self._scale = mean, deviation

    def targets(self, split: str, drawn: Sequence[Drawn], width: int) -> Tensor:  # noqa: ARG002 - the same at any width
        return self.of(split, [one.number for one in drawn])

    def of(self, split: str, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """The targets of sequences as the loss takes them."""
        if split not in self._targets:  # not before they are asked for: new sequences have none
            self._targets[split] = self._labelled.targets(split)
        targets = torch.from_numpy(self._targets[split][numbers])
        if self._labelled.task == "classification":
            return targets
        mean, deviation = self._scale
        return ((targets - mean) / deviation).float()

    def scored(self, split: str, drawn: Sequence[Drawn], width: int) -> float:  # noqa: ARG002
        return self._share * len(drawn)

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return self._share * self.losses(answers, targets).sum()

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        """[B], in nats, or squared deviations."""
        if self._labelled.task == "classification":
            return F.cross_entropy(answers, targets, reduction="none")
        if self._labelled.task == "multilabel":
            return F.binary_cross_entropy_with_logits(answers, targets.to(answers.dtype), reduction="none").mean(-1)
        return (answers[:, 0] - targets.to(answers.dtype)).square()

    def whole(self, answers: Tensor, width: int) -> Tensor:  # noqa: ARG002
        return answers.double()

    def turned(self, answers: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        return answers

    def tally(self, split: str) -> "WholeTally":
        return WholeTally(self, self._labelled, split)

    def in_units(self, answers: Tensor) -> np.ndarray:
        """Logits, or numbers in the units of the labels."""
        mean, deviation = self._scale
        return (answers * deviation + mean).numpy()

    def said(self, row: Tensor, bases: int) -> np.ndarray:  # noqa: ARG002 - one answer, however long
        return self.in_units(row.cpu())


class WholeTally:
    """Every answer is kept: some metrics are of all at once."""

    def __init__(self, task: WholeAnswers, labelled: Labelled, split: str) -> None:
        self._task, self._labelled, self._split = task, labelled, split
        self._found = torch.zeros(len(labelled.splits[split]), labelled.outputs + 1, dtype=torch.float64)

    def add(self, numbers: Sequence[int], answers: Tensor) -> None:
        self._found[torch.tensor(numbers, dtype=torch.int64), :-1] = answers.cpu()
        self._found[torch.tensor(numbers, dtype=torch.int64), -1] = 1

    def reduce(self, data: Axis) -> None:
        self._found = summed(self._found, data)

    @property
    def _seen(self) -> np.ndarray:
        return (self._found[:, -1] > 0).numpy()

    def loss(self) -> tuple[float, float]:
        numbers = np.flatnonzero(self._seen)
        losses = self._task.losses(self._found[numbers, :-1], self._task.of(self._split, numbers))
        return float(losses.mean()), float(len(numbers))

    def scores(self) -> dict[str, float | None]:
        """Of what was seen."""
        numbers = np.flatnonzero(self._seen)
        return scores_of(self._labelled.task, self._task.in_units(self._found[numbers, :-1]),
                         self._labelled.targets(self._split)[numbers])

    def judgement(self) -> Predictions:
        assert self._seen.all()
        return Predictions(self._labelled, self._split, self._task.in_units(self._found[:, :-1]))


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks of an axis of a tensor in the host's memory."""
    if axis.size == 1:
        return x
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(axis.group) == "nccl" else x.device
    moved = x.to(device)
    dist.all_reduce(moved, group=axis.group)
    return moved.to(x.device)


def _scale_of(targets: np.ndarray) -> Scale:
    """Of the training labels, by which a regression is learnt."""
    return Scale([float(targets.mean())], [float(targets.std()) or 1.0])
