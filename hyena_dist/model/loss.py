"""The language-model loss: a sum over scored tokens, to be divided by their global count."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.model.vocabulary import refuse_outside
from hyena_dist.ops.precision import compute_dtype
from hyena_dist.parallel.collectives import all_reduce
from hyena_dist.parallel.groups import Axis

ONE_RANK = Axis()


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf where no float is as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def token_loss(logits: Tensor, targets: Tensor, tensor: Axis = ONE_RANK, *,
               ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the scored targets, in nats, and their number; the same on every tensor rank.

    Args:
        logits: [B, l, V / T]; half precision is computed in float32.
        targets: int64 [B, l], each in the vocabulary, 0 to V - 1, or `ignore_index`, which is not scored.
        tensor: the axis over which the vocabulary is split.

    Raises:
        ValueError: another shape or type of targets; on a CPU, a target that is neither. On CUDA the loss and its
            gradient are NaN then: to ask would be to wait for the device in every step.
    """
    size = logits.shape[-1] * tensor.size
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape {list(logits.shape[:-1])}, one for each of the logits "
                         f"{list(logits.shape)}, got {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}")
    scored = targets != ignore_index
    refuse_outside("targets", targets, size, only=scored)
    inside = targets.clamp(0, size - 1)
    outside = scored & (targets != inside)
    if tensor.size > 1:
        return _CrossEntropy.apply(logits, targets, scored, outside, tensor), scored.sum()
    log_probability = torch.log_softmax(logits, -1, dtype=compute_dtype(logits))
    picked = log_probability.gather(-1, inside[..., None]).squeeze(-1)  # an index would make its gradient anew
    weight = torch.mul(scored, -1, out=torch.empty_like(picked)).masked_fill_(outside, math.nan)
    return (picked * weight).sum(), scored.sum()


class _CrossEntropy(torch.autograd.Function):
    """The same over a split vocabulary: log(sum exp) - the target's logit, both summed over the ranks that hold
    its parts; 0 where a target is not scored, NaN with its gradient where one is outside. Saves the logits, and one
    number for each token."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, scored: Tensor, outside: Tensor, axis: Axis) -> Tensor:
        values = logits.to(compute_dtype(logits))
        largest = values.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
        local, here = _local_targets(targets, scored, logits.shape[-1], axis)
        picked = values.gather(-1, local[..., None])[..., 0].sub_(largest).mul_(here)
        sums = torch.stack([(values - largest[..., None]).exp_().sum(-1), picked])
        sums = all_reduce(sums, axis)
        ctx.save_for_backward(logits, targets, scored, largest.add_(sums[0].log_().masked_fill_(outside, math.nan)))
        ctx.axis = axis
        return (sums[0] - sums[1]).mul_(scored).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, scored, log_sum = ctx.saved_tensors
        local, here = _local_targets(targets, scored, logits.shape[-1], ctx.axis)
        probability = (logits.to(log_sum.dtype) - log_sum[..., None]).exp_()
        probability.scatter_add_(-1, local[..., None], -here.to(log_sum.dtype)[..., None])
        return probability.mul_(scored[..., None] * grad).to(logits.dtype), None, None, None, None


def _local_targets(targets: Tensor, scored: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The targets' places in this rank's part of the vocabulary, and whether they are scored and in it."""
    local = targets - axis.rank * size
    here = scored & (local >= 0) & (local < size)
    return local.masked_fill(~here, 0), here
