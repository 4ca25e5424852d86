"""What `ops.hyena` calls: the operator between its two products, and its gradients, by kernels."""

import torch
from torch import Tensor

from hyena_dist.ops.hyena import HyenaWeights
from hyena_dist.ops.triton.fft import ByCufft
from hyena_dist.ops.triton.long_row import LongRow
from hyena_dist.ops.triton.one_row import OneRow
from hyena_dist.ops.triton.plans import WIDE_MEMORY, SmallPlan, plan_for


def mix(p: Tensor, weights: HyenaWeights) -> Tensor:
    """From the projection [B, 3 C, L] to what the last product reads, [B, C, L]."""
    with torch.cuda.device_of(p):
        return _both_directions(p, weights).mix(weights.filters[0].contiguous(), weights.bias[0].contiguous())


def mix_backward(p: Tensor, dy: Tensor, weights: HyenaWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix` at the short convolution's weight and bias, the filters and their bias. That at p takes p's
    place, and `mix(p)` takes dy's, which must be contiguous."""
    assert dy.is_contiguous(), dy.stride()
    with torch.cuda.device_of(p):
        dweight, dbias, dh, ddirect = _both_directions(p, weights).mix_backward(
            dy, weights.filters[0].contiguous(), weights.bias[0].contiguous())
    return dweight, dbias, dh[None], ddirect[None]


def _both_directions(p: Tensor, weights: HyenaWeights) -> OneRow | LongRow | ByCufft:
    blocks = p.unflatten(1, (3, p.shape[1] // 3))
    short = weights.short_weight.contiguous(), weights.short_bias.contiguous()
    plan = plan_for(p.shape[-1], p.dtype == torch.float32, _wide(p.device))
    if plan is None:
        return ByCufft(blocks, *short)
    return OneRow(blocks, *short, plan) if isinstance(plan, SmallPlan) else LongRow(blocks, *short, plan)


def _wide(device: torch.device) -> bool:
    """Whether its programs have the shared memory of the largest tiles. Triton's interpreter takes any."""
    return device.type != "cuda" or (
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= WIDE_MEMORY)
