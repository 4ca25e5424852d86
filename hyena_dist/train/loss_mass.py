"""How much of what a run has learnt from, in scored bases and their weights, was of each source of its mixture."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hyena_dist.data.errors import DataError
from hyena_dist.data.stream import Batch
from hyena_dist.parallel.groups import Groups

logger = logging.getLogger(__name__)


class LossMass:
    """Counts bases from the first step on, and goes on from a checkpoint. They are whole numbers, so the counts of a
    run that was stopped are exactly those of one that was not, whatever the layouts.

    Args:
        sources: their names.
        lower_case_weight: how much a soft-masked base counts.
        device: where collectives want their tensors.
    """

    def __init__(self, sources: Sequence[str], lower_case_weight: float, groups: Groups, device: torch.device) -> None:
        self._sources, self._weight, self._groups, self._device = list(sources), lower_case_weight, groups, device
        self._all = torch.zeros(len(self._sources), 2, dtype=torch.int64)
        """Of each source, the scored bases that are upper case and that are soft-masked, of all ranks together."""
        self._own = torch.zeros_like(self._all)
        """What this rank has counted since they were added up."""

    def add(self, sources: Sequence[int], batch: Batch) -> None:
        """Count a batch of this rank, whose windows are of these sources."""
        self._own.index_add_(0, torch.tensor(sources, dtype=torch.int64), batch.scored_by_row())

    def shares(self) -> dict[str, float]:
        """The share of each source by its name; nothing while nothing was scored. Collective."""
        counts = self._added_up().double()
        mass = counts[:, 0] + self._weight * counts[:, 1]
        return dict(zip(self._sources, (mass / mass.sum()).tolist(), strict=True)) if mass.any() else {}

    def state_dict(self) -> list[list[int]]:
        """The counts of all ranks. Collective."""
        return self._added_up().tolist()

    def load_state_dict(self, saved: Any, weight: Any) -> None:
        """Go on from the counts of a checkpoint; where an earlier version saved none (None), or soft-masked bases had
        another weight when they were counted, from 0, and it is said.

        Args:
            weight: of a soft-masked base in the run that saved it.

        Raises:
            DataError: they are no counts of as many sources.
        """
        if saved is None:
            logger.warning("the checkpoint does not say how much of each source was scored before it: "
                           "source_loss_mass counts from this step on")
            saved = torch.zeros_like(self._all).tolist()
        elif weight != self._weight:
            logger.warning("data.lower_case_weight was %s and is %s: source_loss_mass counts from this step on",
                           weight, self._weight)
            saved = torch.zeros_like(self._all).tolist()
        if not (isinstance(saved, list) and len(saved) == len(self._sources) and all(
                isinstance(row, list) and len(row) == 2 and all(type(count) is int and 0 <= count < 1 << 63
                                                                for count in row) for row in saved)):
            raise DataError(f"cannot resume the data stream: the saved source_mass is {saved!r:.80}, which is not two "
                            f"counts for each of the {len(self._sources)} sources; take the weights alone: "
                            "train.resume=weights:PATH in a new train.run_dir")
        self._all, self._own = torch.tensor(saved, dtype=torch.int64), torch.zeros_like(self._all)

    def _added_up(self) -> torch.Tensor:
        own = self._own.to(self._device)
        if self._groups.data_context.size > 1:
            dist.all_reduce(own, group=self._groups.data_context.group)
        self._all += own.cpu()
        self._own.zero_()
        return self._all
