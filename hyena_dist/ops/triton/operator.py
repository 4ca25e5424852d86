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
from hyena_dist.ops.triton.long_row import Spectrum
from hyena_dist.ops.triton.plans import MOST_TAPS, LargePlan, plan_for, wide_memory


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


keeps_spectra = False


class Keeping:
    """The same backend, which keeps the filters' spectra for the backward pass in the filters' place: in float16 they
    take as much memory, but for the plan's padding, and are not made twice."""

    keeps_spectra = True
    refusal = staticmethod(refusal)

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
        assert segments is None
        y, *spectra = _mix_and_keep(p, *_short(weights), weights.filters.contiguous(), weights.bias.contiguous())
        return y, spectra

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, _segments: Segments | None,
                     kept: list[Tensor]) -> MixWeights:
        return MixWeights(*_mix_backward_of_spectra(p, dy, *_short(weights), list(weights.filters.shape),
                                                    weights.bias.contiguous(), *kept))


def keeping(asked: Asked) -> Keeping | None:
    """The backend that keeps spectra, where they are about as large as the filters: of whole rows by three kernels in
    half precision."""
    if asked.segmented or asked.dtype.itemsize > 2:
        return None
    plan = plan_for(asked.length, precise=False, wide=wide_memory(asked.device))
    return Keeping() if isinstance(plan, LargePlan) else None


def _arguments(p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Any, ...]:
    """The weights, and the segments: their places and positions (`given.Rows`, `groups.Operator`), and the size, the
    number and the tokens of those of each size."""
    tensors = *_short(weights), weights.filters.contiguous(), weights.bias.contiguous()
    if segments is None:
        return *tensors, None, None, []
    places, sizes = segments.by_size(p.device)
    return *tensors, places, segments.positions(p.device).int(), sizes


def _short(weights: MixWeights) -> tuple[Tensor, Tensor]:
    assert weights.short_weight is not None
    assert weights.short_bias is not None
    return weights.short_weight.contiguous(), weights.short_bias.contiguous()


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


@torch.library.custom_op("hyena::mix_and_keep", mutates_args=())
def _mix_and_keep(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor,
                  direct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(p):
        return _operator(p, weight, bias, h, None, None, []).mix_and_keep(h, direct)


@torch.library.custom_op("hyena::mix_backward_of_spectra", mutates_args=("p", "dy"))
def _mix_backward_of_spectra(p: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, shape: list[int], direct: Tensor,
                             spectra: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dy.is_contiguous(), dy.stride()
    with torch.cuda.device_of(p):
        h = _of_shape(p, shape)
        return _operator(p, weight, bias, h, None, None, [], (spectra, scales)).mix_backward(dy, h, direct)


def _of_shape(p: Tensor, shape: list[int]) -> Tensor:
    """In the place of filters whose shape alone is of use."""
    return p.new_empty((), dtype=torch.float32).expand(shape)


def _kept_fake(p: Tensor, _weight: Tensor, _bias: Tensor, h: Tensor, _direct: Tensor) -> tuple[Tensor, ...]:
    plan = plans_on(p)(p.shape[-1])
    assert isinstance(plan, LargePlan)
    return (p.new_empty(p.shape[0], h.shape[1], p.shape[2]),
            p.new_empty(*h.shape[:2], 2, plan.n1, plan.n2, dtype=torch.float16),
            p.new_empty(*h.shape[:2], plan.n1, dtype=torch.float32))


_mix_and_keep.register_fake(_kept_fake)
_mix_backward_of_spectra.register_fake(lambda _p, _dy, weight, bias, shape, direct, *_: (
    torch.empty_like(weight), torch.empty_like(bias), direct.new_empty(shape, dtype=torch.float32),
    torch.empty_like(direct)))
declare_cost("hyena::mix_and_keep", lambda p, weight, bias, h, _direct: _operator(
    p, weight, bias, h, None, None, []).cost(backward=False))
declare_cost("hyena::mix_backward_of_spectra", lambda p, _dy, weight, bias, shape, _direct, *spectra: _operator(
    p, weight, bias, _of_shape(p, shape), None, None, [], spectra).cost(backward=True))


def _operator(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor, places: Tensor | None, positions: Tensor | None,
              sizes: list[int], spectra: Spectrum | None = None) -> Operator:
    assert p.is_contiguous(), p.stride()
    blocks, plan_of = p.unflatten(1, (len(h) + 2, -1)), plans_on(p)
    if places is None or positions is None:
        return Operator.whole(blocks, weight, bias, plan_of(p.shape[-1]), spectra)
    return Operator.in_segments(blocks, weight, bias, places, positions, sizes, plan_of)


def plans_on(activations: Tensor) -> Callable[[int], Plan]:
    """The plan of rows of a size, of their dtype and on their device."""
    precise, wide = activations.dtype == torch.float32, wide_memory(activations.device)
    return lambda size: plan_for(size, precise, wide)
