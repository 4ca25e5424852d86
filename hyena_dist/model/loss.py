"""The language-model loss: a sum over scored tokens, to be divided by their global count."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.data.tokenizer import IGNORE
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


def token_loss(logits: Tensor, targets: Tensor, tensor: Axis = ONE_RANK, *, ignore_index: int = IGNORE,
               weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the scored targets, in nats, and their number; the same on every tensor rank. Arguments
    and errors are those of `token_losses`.

    Args:
        weights: [B, l], how much each target counts in both sums; None: all 1.
    """
    losses, scored = token_losses(logits, targets, tensor, ignore_index=ignore_index), targets != ignore_index
    if weights is None:
        return losses.flatten().sum(), scored.sum()
    weights = weights.to(losses.dtype)
    # What has no weight is left out and not multiplied by 0: its loss may be infinite, where a token is impossible.
    return (losses.where(weights != 0, 0) * weights).sum(), (scored * weights).sum()


def token_losses(logits: Tensor, targets: Tensor, tensor: Axis = ONE_RANK, *, ignore_index: int = IGNORE) -> Tensor:
    """Cross-entropy of each target in nats, [B, l], 0 where it is not scored; the same on every tensor rank.

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
    fits = (targets == inside) >= scored  # all but those that are scored and outside
    if tensor.size > 1:
        return _CrossEntropy.apply(logits, targets, ~scored, ~fits, tensor)
    log_probability = torch.log_softmax(logits, -1, dtype=compute_dtype(logits))
    losses = F.nll_loss(log_probability.flatten(0, -2), torch.where(scored, inside, targets).flatten(),
                        ignore_index=ignore_index, reduction="none")
    return (losses * (fits / fits).flatten()).view(targets.shape)  # 0 / 0 is NaN, and so is the gradient


class _CrossEntropy(torch.autograd.Function):
    """The same over a split vocabulary: log(sum exp) - the target's logit, both summed over the ranks that hold
    its parts; 0 where a target is not scored, NaN with its gradient where one is outside. Saves the logits, and one
    number for each token."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, unscored: Tensor, outside: Tensor, axis: Axis) -> Tensor:
        values = logits.to(compute_dtype(logits))
        largest = values.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
        # What does not count is filled and not multiplied by 0: it may be infinite, where a token is impossible.
        local, elsewhere = _local_targets(targets, unscored, logits.shape[-1], axis)
        picked = values.gather(-1, local[..., None])[..., 0].sub_(largest).masked_fill_(elsewhere, 0)
        sums = torch.stack([(values - largest[..., None]).exp_().sum(-1), picked])
        sums = all_reduce(sums, axis)
        ctx.save_for_backward(logits, targets, unscored, largest.add_(sums[0].log_().masked_fill_(outside, math.nan)))
        ctx.axis = axis
        return (sums[0] - sums[1]).masked_fill_(unscored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, unscored, log_sum = ctx.saved_tensors
        local, elsewhere = _local_targets(targets, unscored, logits.shape[-1], ctx.axis)
        probability = (logits.to(log_sum.dtype) - log_sum[..., None]).exp_()
        probability.scatter_add_(-1, local[..., None], elsewhere.to(log_sum.dtype).sub_(1)[..., None])
        probability.mul_(grad[..., None]).masked_fill_(unscored[..., None], 0)
        return probability.to(logits.dtype), None, None, None, None


def _local_targets(targets: Tensor, unscored: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The targets' places in this rank's part of the vocabulary, and which are not scored or not in it."""
    local = targets - axis.rank * size
    elsewhere = unscored | (local < 0) | (local >= size)
    return local.masked_fill(elsewhere, 0), elsewhere
