"""The backend of Triton's kernels (`ops.mix.Backend`): `mix` and its gradients as custom operators of torch, whose
results' shapes and costs are known without running them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyena_dist.ops.costs import declare_cost
from hyena_dist.ops.mix import Asked, MixWeights
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton.groups import Operator, Plan
from hyena_dist.ops.triton.plans import MOST_TAPS, plan_for, wide_memory


def refusal(asked: Asked) -> str | None:
    """Why the kernels cannot compute this, besides what device and dtype refuse to all kernels."""
    if asked.taps > MOST_TAPS:
        return f"the kernels take short convolutions of at most {MOST_TAPS} taps, got {asked.taps}"
    return None


def mix(p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
    """From the projection [B, (N + 1) C, L] to what the last product reads, [B, C, L]."""
    return _mix(p, *_arguments(p, weights, segments)), []


def mix_backward(p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                 _kept: list[Tensor]) -> MixWeights:
    """Gradients of `mix` at the weights. The gradient at p is written over p, and `mix(p)` over dy; both must be
    contiguous."""
    return MixWeights(*_mix_backward(p, dy, *_arguments(p, weights, segments)))


def _arguments(p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Any, ...]:
    """The weights, and the segments: their places and positions (`given.Rows`, `groups.Operator`), and the size, the
    number and the tokens of those of each size."""
    assert weights.short_weight is not None
    assert weights.short_bias is not None
    tensors = [t.contiguous() for t in (weights.short_weight, weights.short_bias, weights.filters, weights.bias)]
    if segments is None:
        return *tensors, None, None, []
    places, sizes = segments.by_size(p.device)
    return *tensors, places, segments.positions(p.device).int(), sizes


@torch.library.custom_op("hyena::mix", mutates_args=())
def _mix(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor, direct: Tensor, places: Tensor | None,
         positions: Tensor | None, sizes: list[int]) -> Tensor:
    with torch.cuda.device_of(p):
        return _operator(p, weight, bias, h, places, positions, sizes).mix(h, direct)


@torch.library.custom_op("hyena::mix_backward", mutates_args=("p", "dy"))
def _mix_backward(p: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, h: Tensor, direct: Tensor,
                  places: Tensor | None, positions: Tensor | None,
                  sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dy.is_contiguous(), dy.stride()
    with torch.cuda.device_of(p):
        return _operator(p, weight, bias, h, places, positions, sizes).mix_backward(dy, h, direct)


_mix.register_fake(lambda p, _weight, _bias, h, *_: p.new_empty(p.shape[0], h.shape[1], p.shape[2]))
_mix_backward.register_fake(lambda _p, _dy, *rest: tuple(map(torch.empty_like, rest[:4])))
declare_cost("hyena::mix", lambda p, weight, bias, h, _direct, *segments: _operator(
    p, weight, bias, h, *segments).cost(backward=False))
declare_cost("hyena::mix_backward", lambda p, _dy, weight, bias, h, _direct, *segments: _operator(
    p, weight, bias, h, *segments).cost(backward=True))


def _operator(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor, places: Tensor | None, positions: Tensor | None,
              sizes: list[int]) -> Operator:
    assert p.is_contiguous(), p.stride()
    blocks, plan_of = p.unflatten(1, (len(h) + 2, -1)), plans_on(p)
    if places is None or positions is None:
        return Operator.whole(blocks, weight, bias, plan_of(p.shape[-1]))
    return Operator.in_segments(blocks, weight, bias, places, positions, sizes, plan_of)


def plans_on(activations: Tensor) -> Callable[[int], Plan]:
    """The plan of rows of a size, of their dtype and on their device."""
    precise, wide = activations.dtype == torch.float32, wide_memory(activations.device)
    return lambda size: plan_for(size, precise, wide)
