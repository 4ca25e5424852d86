"""The loss of a model over a split of a shard set, on any device and under any layout."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hyena_dist.data.stream import Batch
from hyena_dist.data.tokenizer import IGNORE
from hyena_dist.model.loss import token_losses
from hyena_dist.parallel.groups import Groups


class Score(NamedTuple):
    """Of a group of bases."""

    loss: float
    """Nats per scored base; nan where there were none."""
    scored: int


@dataclass(frozen=True)
class SplitLoss:
    """The same on every rank."""

    loss: float
    """Nats per scored base, also where a token is several."""
    scored: int
    sums: np.ndarray
    """float64 [2, kinds, classes]: the losses and the number of the bases that were scored, of each kind of bases in
    each class of windows."""

    def by_class(self, names: Sequence[Collection[str]]) -> dict[str, Score]:
        """The score of each name of a class of windows."""
        return grouped(self.sums.sum(1), names)

    def by_kind(self, names: Sequence[Collection[str]]) -> dict[str, Score]:
        """The score of each name of a kind of bases."""
        return grouped(self.sums.sum(2), names)


def grouped(sums: np.ndarray, names: Sequence[Collection[str]]) -> dict[str, Score]:
    """The score of each name, in the order in which they come first; what has no scored base is left out.

    Args:
        sums: [2, n], the losses and the number of the bases of each of n classes.
        names: of each class; it counts for each of its names.
    """
    found: dict[str, tuple[float, int]] = {}
    for of_class, (total, scored) in zip(names, sums.T.tolist(), strict=True):
        for name in of_class:
            before = found.get(name, (0.0, 0))
            found[name] = before[0] + total, before[1] + int(scored)
    return {name: Score(total / scored, scored) for name, (total, scored) in found.items() if scored}


CASES = ("upper",), ("lower",)
"""Names of the kinds of bases that a validation tells apart by itself."""


def soft_kinds(batch: Batch) -> torch.Tensor:
    """int64 [B, l], 1 for targets that are soft-masked."""
    return torch.zeros_like(batch.ids[:, 1:], dtype=torch.int64) if batch.soft is None else batch.soft.long()


@torch.no_grad()
def evaluate_split(model: nn.Module, batches: Iterable[Batch], groups: Groups, device: torch.device, *,
                   class_of: Sequence[int] = (), classes: int = 1, kinds: int = len(CASES),
                   kinds_of: Callable[[Batch], torch.Tensor] = soft_kinds) -> SplitLoss | None:
    """Mean loss over every scored base of a split, and the sums over classes of windows and kinds of bases; None where
    the split has no scored base. Collective.

    The sums stay on the device until the end: the host does not wait for it between batches.

    Args:
        model: a HyenaModel or what an engine made of it; left in eval mode.
        batches: this rank's (`ValidationBatches`), on every rank as many.
        class_of: of each window of the split by its number, 0 to classes - 1; windows beyond are of class 0.
        kinds_of: of each target of a batch, int64 [B, l] from 0 to kinds - 1.
    """
    found = torch.zeros(2, kinds, classes, dtype=torch.float64, device=device)
    of_window = torch.tensor([*class_of, 0], dtype=torch.int64, device=device)
    model.eval()
    for batch in batches:
        input_ids, targets, windows = batch.to(device)
        apart = {} if batch.segments is None else {"segments": batch.segments}
        losses = token_losses(model(input_ids, **apart), targets, groups.tensor)
        kind = kinds_of(batch)
        kind = (kind.pin_memory() if device.type == "cuda" else kind).to(device, non_blocking=True)
        others = [kind != number for number in range(kinds)]
        rows = torch.stack([torch.stack([values.masked_fill(other, 0).sum(-1).double() for other in others])
                            for values in (losses, (targets != IGNORE) * batch.tokenizer.stride)])
        found.index_add_(2, of_window[windows.clamp(max=len(class_of))], rows)
    if groups.data_context.size > 1:
        dist.all_reduce(found, group=groups.data_context.group)
    sums = found.cpu().numpy()
    total, count = sums.sum((1, 2)).tolist()
    return SplitLoss(total / count, int(count), sums) if count else None
