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
        picked = values.gather(-1, local[..., None])[..., 0].sub_(largest)
        sums = (values - largest[..., None]).exp_().sum(-1)
        if axis.size > 1:
            sums, picked = all_reduce(torch.stack([sums, picked.mul_(here)]), axis)
        ctx.save_for_backward(logits, targets, scored, largest.add_(sums.log_()))
        ctx.axis = axis
        return (sums - picked).mul_(scored).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, scored, log_sum = ctx.saved_tensors
        local, here = _local_targets(targets, scored, logits.shape[-1], ctx.axis)
        probability = (logits - log_sum[..., None]).exp_()
        # What is subtracted where no target is scored is not used.
        share = log_sum.new_full((), -1).expand(log_sum.shape) if here is scored else -here.to(log_sum.dtype)
        probability.scatter_add_(-1, local[..., None], share[..., None])
        gradient = torch.mul(probability, scored[..., None] * grad, out=torch.empty_like(logits))
        return gradient, None, None, None


def _local_targets(targets: Tensor, scored: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The targets' places in this rank's part of the vocabulary, and whether they are scored and in it. On one rank
    every scored target is."""
    if axis.size == 1:
        return targets * scored, scored
    local = targets - axis.rank * size
    here = scored & (local >= 0) & (local < size)
    return local.masked_fill(~here, 0), here
