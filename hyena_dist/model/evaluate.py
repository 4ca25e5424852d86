"""The loss of a model over a split of a shard set, on any device and under any layout."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hyena_dist.data.stream import Batch
from hyena_dist.data.tokenizer import IGNORE
from hyena_dist.model.loss import token_losses
from hyena_dist.parallel.groups import Groups


@dataclass(frozen=True)
class SplitLoss:
    """The same on every rank."""

    loss: float
    """Nats per scored base."""
    scored: int
    parts: tuple[tuple[float, int], ...] = ()
    """Of each class of windows, loss and number of the bases that were scored; nan where there were none."""
    cases: tuple[tuple[float, int], ...] = ()
    """The same of bases of upper case, and of those that are soft-masked."""


@torch.no_grad()
def evaluate_split(model: nn.Module, batches: Iterable[Batch], groups: Groups, device: torch.device, *,
                   class_of: Sequence[int] = (), classes: int = 1) -> SplitLoss | None:
    """Mean loss over every scored base of a split, and over those of each class of windows; None where it has none.
    Collective.

    The sums stay on the device until the end: the host does not wait for it between batches.

    Args:
        model: a HyenaModel or what an engine made of it; left in eval mode.
        batches: this rank's (`ValidationBatches`), on every rank as many.
        class_of: of each window of the split by its number, 0 to classes - 1; windows beyond are of class 0.
    """
    found = torch.zeros(2, 2, classes, dtype=torch.float64, device=device)
    of_window = torch.tensor([*class_of, 0], dtype=torch.int64, device=device)
    model.eval()
    for batch in batches:
        input_ids, targets, windows = batch.to(device)
        losses = token_losses(model(input_ids), targets, groups.tensor)
        soft = batch.soft_on(device)
        soft = torch.zeros_like(targets, dtype=torch.bool) if soft is None else soft
        rows = torch.stack([torch.stack([values.masked_fill(other, 0).sum(-1).double() for other in (soft, ~soft)])
                            for values in (losses, targets != IGNORE)])
        found.index_add_(2, of_window[windows.clamp(max=len(class_of))], rows)
    if groups.data_context.size > 1:
        dist.all_reduce(found, group=groups.data_context.group)
    found = found.cpu()
    total, count = found.sum((1, 2)).tolist()
    return SplitLoss(total / count, int(count), _means(found.sum(1)), _means(found.sum(2))) if count else None


def _means(found: torch.Tensor) -> tuple[tuple[float, int], ...]:
    """Mean and count of each column of [2, n] sums and counts."""
    return tuple((total / count if count else math.nan, int(count)) for total, count in found.T.tolist())
