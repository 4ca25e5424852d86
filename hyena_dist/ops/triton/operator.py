"""The backend of Triton's kernels (`ops.mix.Backend`): `mix` and its gradients as custom operators of torch, whose
results' shapes and costs are known without running them."""

import torch
from torch import Tensor

from hyena_dist.ops.costs import declare_cost
from hyena_dist.ops.mix import Asked, MixWeights
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton.fft import ByCufft
from hyena_dist.ops.triton.groups import ByGroups
from hyena_dist.ops.triton.long_row import LongRow
from hyena_dist.ops.triton.one_row import OneRow
from hyena_dist.ops.triton.plans import WIDE_MEMORY, SmallPlan, plan_for

MOST_TAPS = 8


def refusal(asked: Asked) -> str | None:
    """Why the kernels cannot compute this, besides what device and dtype refuse to all kernels."""
    if asked.order != 2:
        return f"the kernels are of order 2, the model is of order {asked.order}"
    if asked.taps > MOST_TAPS:
        return f"the kernels take short convolutions of at most {MOST_TAPS} taps, got {asked.taps}"
    return "the kernels do not know segments" if asked.segmented else None


def mix(p: Tensor, weights: MixWeights, _segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
    """From the projection [B, 3 C, L] to what the last product reads, [B, C, L]."""
    return _mix(p, *_tensors(weights)), []


def mix_backward(p: Tensor, dy: Tensor, weights: MixWeights, _segments: Segments | None,
                 _kept: list[Tensor]) -> MixWeights:
    """Gradients of `mix` at the weights. The gradient at p is written over p, and `mix(p)` over dy; both must be
    contiguous."""
    dweight, dbias, dh, ddirect = _mix_backward(p, dy, *_tensors(weights))
    return MixWeights(dweight, dbias, dh[None], ddirect[None])


def _tensors(weights: MixWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert weights.short_weight is not None
    assert weights.short_bias is not None
    return (weights.short_weight.contiguous(), weights.short_bias.contiguous(), weights.filters[0].contiguous(),
            weights.bias[0].contiguous())


@torch.library.custom_op("hyena::mix", mutates_args=())
def _mix(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    with torch.cuda.device_of(p):
        return _by_kernels(p, weight, bias).mix(h, direct)


@torch.library.custom_op("hyena::mix_backward", mutates_args=("p", "dy"))
def _mix_backward(p: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, h: Tensor,
                  direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dy.is_contiguous(), dy.stride()
    with torch.cuda.device_of(p):
        return _by_kernels(p, weight, bias).mix_backward(dy, h, direct)


_mix.register_fake(lambda p, *_: p.new_empty(p.shape[0], p.shape[1] // 3, p.shape[2]))
_mix_backward.register_fake(lambda _p, _dy, *weights: tuple(map(torch.empty_like, weights)))
declare_cost("hyena::mix", lambda p, weight, bias, *_: _by_kernels(p, weight, bias).cost(backward=False))
declare_cost("hyena::mix_backward", lambda p, _dy, weight, bias, *_: _by_kernels(p, weight, bias).cost(backward=True))


def _by_kernels(p: Tensor, weight: Tensor, bias: Tensor) -> ByGroups:
    assert p.is_contiguous(), p.stride()
    blocks = p.unflatten(1, (3, p.shape[1] // 3))
    plan = plan_for(p.shape[-1], p.dtype == torch.float32, _wide(p.device))
    if plan is None:
        return ByCufft(blocks, weight, bias)
    return OneRow(blocks, weight, bias, plan) if isinstance(plan, SmallPlan) else LongRow(blocks, weight, bias, plan)


def _wide(device: torch.device) -> bool:
    """Whether its programs have the shared memory of the largest tiles. Triton's interpreter takes any."""
    return device.type != "cuda" or (
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= WIDE_MEMORY)
