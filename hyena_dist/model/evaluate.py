"""The loss of a model over a split of a shard set, on any device and under any layout."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hyena_dist.data.stream import Batch
from hyena_dist.model.loss import token_loss
from hyena_dist.parallel.groups import Groups


@dataclass(frozen=True)
class SplitLoss:
    """The same on every rank."""

    loss: float
    """Nats per scored base."""
    scored: int


@torch.no_grad()
def evaluate_split(model: nn.Module, batches: Iterable[Batch], groups: Groups, device: torch.device,
                   ) -> SplitLoss | None:
    """Mean loss over every scored base of a split; None where it has none. Collective.

    The sums stay on the device until the end: the host does not wait for it between batches.

    Args:
        model: a HyenaModel or what an engine made of it; left in eval mode.
        batches: this rank's (`ValidationBatches`), on every rank as many.
    """
    sums = torch.zeros((), dtype=torch.float64, device=device)
    scored = 0
    model.eval()
    for batch in batches:
        input_ids, targets, _ = batch.to(device)
        loss, _ = token_loss(model(input_ids), targets, groups.tensor)
        sums += loss.double()
        scored += batch.scored
    found = torch.stack([sums, torch.full((), scored, dtype=torch.float64, device=device)])
    if groups.data_context.size > 1:
        dist.all_reduce(found, group=groups.data_context.group)
    total, count = found.tolist()
    return SplitLoss(total / count, int(count)) if count else None
