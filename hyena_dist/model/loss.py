"""The language-model loss: a sum over scored tokens, to be divided by their global count."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.parallel.collectives import reduce_from
from hyena_dist.parallel.groups import Axis

ONE_RANK = Axis()


def token_loss(logits: Tensor, targets: Tensor, tensor: Axis = ONE_RANK, *,
               ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the scored targets, in nats, and their number; the same on every tensor rank.

    Args:
        logits: [B, l, V / T]; half precision is computed in float32.
        targets: int64 [B, l]; `ignore_index` is not scored.
        tensor: the axis over which the vocabulary is split.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    scored = targets != ignore_index
    if tensor.size == 1:
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    else:
        total = _vocab_parallel_cross_entropy(logits, targets.masked_fill(~scored, 0), tensor)[scored].sum()
    return total, scored.sum()


def _vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """logits [..., V / T], targets [...] -> the loss of every token, [...]: log(sum exp) - the target's logit, both
    summed over the ranks that hold parts of the vocabulary."""
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    shifted = logits - largest[..., None]
    local = targets - axis.rank * logits.shape[-1]
    elsewhere = (local < 0) | (local >= logits.shape[-1])
    picked = shifted.gather(-1, local.masked_fill(elsewhere, 0)[..., None])[..., 0].masked_fill(elsewhere, 0)
    sums = reduce_from(torch.stack([shifted.exp().sum(-1), picked]), axis)
    return sums[0].log() - sums[1]
