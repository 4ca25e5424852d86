"""The loss of a model over a split of a shard set, on any device and under any layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch, Part, validation_batches
from hyena_dist.model.loss import token_loss
from hyena_dist.parallel.groups import Groups


@dataclass(frozen=True)
class SplitLoss:
    """The same on every rank."""

    loss: float
    """Nats per scored base."""
    scored: int


@torch.no_grad()
def evaluate_split(model: nn.Module, manifest: Manifest, groups: Groups, device: torch.device, *, split: str = "val",
                   seq_len: int, batch_size: int, part: Part | None = None,
                   watched: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
                   ) -> SplitLoss | None:
    """Mean loss over every scored base of a split, tiled with windows of `seq_len`; None where it has none. Collective.

    The sums stay on the device until the end: the host does not wait for it between batches.

    Args:
        model: a HyenaModel or what an engine made of it; left in eval mode.
        batch_size: windows of a forward pass on each data rank.
        part: what this context rank reads of a window; None: all of it.
        watched: what the batches go through on their way, on every rank as many.
    """
    sums = torch.zeros((), dtype=torch.float64, device=device)
    scored = 0
    model.eval()
    for batch in watched(validation_batches(manifest, split=split, seq_len=seq_len, batch_size=batch_size,
                                            dp_rank=groups.data.rank, dp_size=groups.data.size, part=part)):
        input_ids, targets, _ = batch.to(device)
        loss, _ = token_loss(model(input_ids), targets, groups.tensor)
        sums += loss.double()
        scored += batch.scored
    found = torch.stack([sums, torch.full((), scored, dtype=torch.float64, device=device)])
    if groups.data_context.size > 1:
        dist.all_reduce(found, group=groups.data_context.group)
    total, count = found.tolist()
    return SplitLoss(total / count, int(count)) if count else None
