"""The language-model loss: a sum over scored tokens, to be divided by their global count."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.precision import compute_dtype
from hyena_dist.parallel.collectives import all_reduce
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
    scored = targets != ignore_index
    return _CrossEntropy.apply(logits, targets, scored, tensor), scored.sum()


class _CrossEntropy(torch.autograd.Function):
    """log(sum exp) - the target's logit, both summed over the ranks that hold parts of the vocabulary; 0 where a
    target is not scored. Saves the logits, and one number for each token."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, scored: Tensor, axis: Axis) -> Tensor:
        values = logits.to(compute_dtype(logits))
        largest = values.amax(-1)
        if axis.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
        local, here = _local_targets(targets, scored, logits.shape[-1], axis)
        picked = values.gather(-1, local[..., None])[..., 0].sub_(largest).mul_(here)
        sums = torch.stack([(values - largest[..., None]).exp_().sum(-1), picked])
        if axis.size > 1:
            sums = all_reduce(sums, axis)
        ctx.save_for_backward(logits, targets, scored, largest.add_(sums[0].log_()))
        ctx.axis = axis
        return (sums[0] - sums[1]).mul_(scored).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, scored, log_sum = ctx.saved_tensors
        local, here = _local_targets(targets, scored, logits.shape[-1], ctx.axis)
        probability = (logits.to(log_sum.dtype) - log_sum[..., None]).exp_()
        probability.scatter_add_(-1, local[..., None], -here.to(log_sum.dtype)[..., None])
        return probability.mul_(scored[..., None] * grad).to(logits.dtype), None, None, None


def _local_targets(targets: Tensor, scored: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The targets' places in this rank's part of the vocabulary, and whether they are scored and in it."""
    local = targets - axis.rank * size
    here = scored & (local >= 0) & (local < size)
    return local.masked_fill(~here, 0), here
