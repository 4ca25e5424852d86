"""Answers for the places of sequences: a class for each base, numbers for each bin, a number for each pair of bins.

Targets are in the order of a rank's own places, as its answers are, and as many for each sequence of a batch: what
stands behind the end of a shorter one is not known, and is never scored.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.labelled import Labelled
from hyena_dist.data.scale import Scale
from hyena_dist.data.tokenizer import IGNORE
from hyena_dist.model.binned import BinMeans, BinnedModel
from hyena_dist.model.headed import HeadedModel
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.pairs import PairModel, pairs_of
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.collectives import reduce_from
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.answers import Answers, Drawn, Tally, WholeAnswers, summed
from hyena_dist.train.place_tallies import ClassTally, NumberTally, bin_tally, pair_tally


class PlaceAnswers:
    """What the three have in common."""

    metrics: Collection[str]
    scored_name: str
    scale: Scale | None = None

    def __init__(self, labelled: Labelled, section: FinetuneSection, model: BinMeans) -> None:
        self._labelled, self._section, self.model, self.bin_size = labelled, section, model, model.bin_size

    def of(self, split: str, drawn: Sequence[Drawn], bins: int) -> Tensor:
        """[B, bins, ...] of whole sequences, unknown behind their ends."""
        rows = []
        for one in drawn:
            array = torch.from_numpy(self._labelled.at_places(split, one.number))
            array = self.turn(array) if one.reverse else array
            room = [size for side in reversed(array.shape[: self.sides]) for size in (0, bins - side)]
            rows.append(F.pad(array, [0, 0] * (array.dim() - self.sides) + room, value=self.unknown))
        return torch.stack(rows)

    sides = 1
    """How many dimensions of a sequence's labels are its bins."""
    unknown: float = math.nan

    def turn(self, array: Tensor) -> Tensor:
        """The labels of a sequence's other strand."""
        return array.flip(0)

    def targets(self, split: str, drawn: Sequence[Drawn], width: int) -> Tensor:
        return self._own(self.of(split, drawn, width // self.bin_size), self._tokens(width))

    def _tokens(self, width: int) -> int:
        """That each rank holds of a batch."""
        return width // (self.model.context.size * self.model.sequence.size)

    def _own(self, whole: Tensor, tokens: int) -> Tensor:
        own = self.model.own_bins(tokens)
        return whole[:, own.start : own.stop]

    def scored(self, split: str, drawn: Sequence[Drawn], width: int) -> float:
        own = self.model.own_bins(self._tokens(width), of_slice=True)
        return float(self.known(self.of(split, drawn, width // self.bin_size)[:, own.start : own.stop]).sum())

    def known(self, targets: Tensor) -> Tensor:
        """Which of them are labels."""
        return ~targets.isnan()

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return reduce_from(self.losses(answers, targets).sum(), self.model.sequence)

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Of each target, 0 where it is unknown."""
        raise NotImplementedError

    def whole(self, answers: Tensor, width: int) -> Tensor:
        own, bins = self.model.own_bins(self._tokens(width)), width // self.bin_size
        found = answers.new_zeros(len(answers), bins, answers.shape[-1], dtype=torch.float64, device="cpu")
        found[:, own.start : own.stop] = answers.double().cpu()
        return summed(summed(found, self.model.context), self.model.sequence)

    def tally(self, split: str) -> Tally:
        """An empty one."""
        raise NotImplementedError

    def turned(self, answers: Tensor, lengths: Sequence[int]) -> Tensor:
        found = answers.clone()
        for row, length in zip(found, lengths, strict=True):
            inside = (slice(length // self.bin_size),) * self.sides
            row[inside] = self.turn(row[inside]).clone()
        return found

    def said(self, row: Tensor, bases: int) -> np.ndarray:
        """As of `Answers`."""
        cut = 0 if self._section.task == "per_base" else self._section.bins_cut
        inside = (slice(cut, bases // self.bin_size - cut),) * self.sides
        return self.in_units(row)[inside].numpy()

    def in_units(self, answers: Tensor) -> Tensor:
        """What the model's answers say: logits, or numbers in the units of the labels."""
        return answers


class BaseAnswers(PlaceAnswers):
    """A class for each base."""

    metrics: Collection[str] = ("accuracy", "f1_macro", "mcc")
    scored_name = "bases"
    unknown = IGNORE

    def known(self, targets: Tensor) -> Tensor:
        return targets != IGNORE

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        found = F.cross_entropy(answers.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return found.view(targets.shape)

    def tally(self, split: str) -> ClassTally:
        return ClassTally(self._labelled, split, self.losses)


class _Numbers(PlaceAnswers):
    """Numbers, which are learnt by the scale of the training labels, of each track."""

    def __init__(self, labelled: Labelled, section: FinetuneSection, model: BinMeans) -> None:
        super().__init__(labelled, section, model)
        assert labelled.scale is not None
        self.scale = labelled.scale
        self._mean, self._deviation = (torch.tensor(part, dtype=torch.float64) for part in labelled.scale)

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._mean.to(like), self._deviation.to(like)

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        known, (mean, deviation) = self.known(targets), self._scale(answers)
        # What is unknown is replaced before the loss and not only in it: 0 times the gradient of a loss that is not
        # finite would be NaN.
        targets = torch.where(known, targets.to(answers.dtype), mean)
        values = self.in_units(torch.where(known, answers, 0))
        if self._section.loss == "poisson":
            # The deviance, which is 0 at best: of the logarithm of a rate that goes to 0 only where counts are 0.
            found = values - targets + torch.xlogy(targets, targets) - targets * values.log()
        else:
            found = ((values - targets) / deviation).square()
        return torch.where(known, found, 0)

    def in_units(self, answers: Tensor) -> Tensor:
        """What the model's numbers say in the units of the labels."""
        mean, deviation = self._scale(answers)
        if self._section.loss == "poisson":
            return (mean + 1e-6) * (F.softplus(answers) / math.log(2) + 1e-6)
        return answers * deviation + mean


class BinAnswers(_Numbers):
    """Numbers for each bin, one for each track."""

    metrics: Collection[str] = ("pearson", "mean_squared_error")
    scored_name = "numbers of bins"

    def tally(self, split: str) -> NumberTally:
        return bin_tally(self._labelled, split, self, self._mean)


class PairAnswers(_Numbers):
    """A number for each pair of bins."""

    metrics: Collection[str] = ("pearson", "stratum_pearson", "mean_squared_error")
    scored_name = "pairs of bins"
    sides = 2

    def turn(self, array: Tensor) -> Tensor:
        return array.flip(0, 1).transpose(0, 1)

    def said(self, row: Tensor, bases: int) -> np.ndarray:
        found = super().said(row, bases)
        found[np.tri(len(found), k=self._section.diagonals - 1, dtype=bool)] = np.nan  # pairs that have no answer
        return found

    def _own(self, whole: Tensor, tokens: int) -> Tensor:
        first, second = pairs_of(self.model.bins(tokens * self.model.sequence.size), self._section.diagonals,
                                 self.model.context)
        return whole[:, first, second]

    def scored(self, split: str, drawn: Sequence[Drawn], width: int) -> float:
        return float(self.known(self.targets(split, drawn, width)).sum())

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return self.losses(answers, targets).sum()

    def whole(self, answers: Tensor, width: int) -> Tensor:
        bins = width // self.bin_size
        first, second = pairs_of(bins, self._section.diagonals, self.model.context)
        found = answers.new_zeros(len(answers), bins, bins, dtype=torch.float64, device="cpu")
        found[:, first, second] = answers.double().cpu()
        return summed(found, self.model.context)

    def tally(self, split: str) -> NumberTally:
        return pair_tally(self._labelled, split, self, self._mean)


def model_of(labelled: Labelled, section: FinetuneSection, backbone: HyenaModel, *, seed: int) -> HeadedModel:
    """A backbone with the head of a task.

    Args:
        seed: of the head's first values.
    """
    places, outputs = labelled.places, labelled.outputs
    if places is None:
        return PooledModel(backbone, outputs=outputs, pooling=section.pooling, seed=seed)
    if labelled.task == "pairs":
        return PairModel(backbone, bin_size=places.bin_size, diagonals=section.diagonals, seed=seed)
    return BinnedModel(backbone, outputs=outputs, bin_size=places.bin_size, seed=seed)


def answers_of(labelled: Labelled, section: FinetuneSection, model: nn.Module, context: Axis) -> Answers:
    """What is asked of a model that `model_of` made, or of another one that gives one answer for a sequence."""
    if labelled.places is None:
        return WholeAnswers(labelled, context)
    assert isinstance(model, BinMeans)
    kinds: dict[str, Callable[..., Any]] = {"per_base": BaseAnswers, "binned": BinAnswers, "pairs": PairAnswers}
    found: Answers = kinds[labelled.task](labelled, section, model)
    return found
