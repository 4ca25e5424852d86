"""What `ops.hyena` calls: the operator between its two products, and its gradients, by kernels."""

from torch import Tensor

from hyena_dist.ops.hyena import HyenaWeights
from hyena_dist.ops.triton import fft


def mix(p: Tensor, weights: HyenaWeights) -> Tensor:
    """From the projection [B, 3 C, L] to what the last product reads, [B, C, L]."""
    return fft.mix(_blocks(p), *_tensors(weights))


def mix_backward(p: Tensor, dy: Tensor, weights: HyenaWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix` at the short convolution's weight and bias, the filters and their bias. That at p takes p's
    place, and `mix(p)` takes dy's, which must be contiguous."""
    gradients = fft.mix_backward(_blocks(p), dy, *_tensors(weights))
    return *gradients[:2], gradients[2][None], gradients[3][None]


def _blocks(p: Tensor) -> Tensor:
    return p.unflatten(1, (3, p.shape[1] // 3))


def _tensors(weights: HyenaWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (weights.short_weight.contiguous(), weights.short_bias.contiguous(), weights.filters[0].contiguous(),
            weights.bias[0].contiguous())
