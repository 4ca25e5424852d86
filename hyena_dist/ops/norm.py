"""Layer normalisation over the channels, in chunks of tokens.

A norm stands before a product. There it is a part of the product's own function (`ops.linear`, `ops.mlp`,
`ops.hyena`), which recomputes it from its input, so that what it gives is never stored.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import chunks
from hyena_dist.ops.precision import accumulate, compute_dtype, without_autocast


class NormWeights(NamedTuple):
    """What a layer norm is besides its input: weight and bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float


NormArguments = tuple[Tensor | None, Tensor | None, float]
"""The same for an autograd function, which takes flat arguments: (None, None, 0.0) for no norm."""

NO_NORM: NormArguments = (None, None, 0.0)


class NormTape:
    """A norm of chunks of tokens and its gradients, summed over the chunks. Without weights it is the identity.

    torch's own kernel sums a weight's gradient over all tokens in one run on a CPU, which at a million tokens in
    float32 is wrong in the third digit; sums of chunks are not.
    """

    def __init__(self, norm: NormArguments, dtype: torch.dtype) -> None:
        weight, bias, self.eps = norm
        self.dtype = dtype
        self._weights = None if weight is None or bias is None else (weight.to(dtype), bias.to(dtype))
        self._origin = weight
        self._sums: list[Tensor | None] = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, D], normalised; what `backward` needs is kept until the next call."""
        if self._weights is None:
            return x
        self._x = x.to(self.dtype)
        y, self._mean, self._rstd = torch.native_layer_norm(self._x, x.shape[-1:], *self._weights, self.eps)
        return y

    def backward(self, dy: Tensor) -> Tensor:
        """The gradient at the input of the last `forward`."""
        if self._weights is None:
            return dy
        dx, *grads = torch.ops.aten.native_layer_norm_backward(
            dy.to(self.dtype), self._x, dy.shape[-1:], self._mean, self._rstd, *self._weights, [True, True, True])
        self._sums = [accumulate(total, grad) for total, grad in zip(self._sums, grads, strict=True)]
        return dx

    def gradients(self) -> tuple[Tensor | None, Tensor | None, None]:
        """Those of NormArguments."""
        if self._origin is None:
            return None, None, None
        weight, bias = (None if total is None else total.to(self._origin.dtype) for total in self._sums)
        return weight, bias, None


def layer_norm(x: Tensor, norm: NormWeights) -> Tensor:
    """Normalise x [..., D] over its channels, in float32 for half precision too."""
    return _LayerNorm.apply(x, *norm)


def layer_norm_reference(x: Tensor, norm: NormWeights) -> Tensor:
    """The same function by torch."""
    dtype = compute_dtype(x, norm.weight)
    with without_autocast(x):
        return F.layer_norm(x.to(dtype), x.shape[-1:], norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        tape = NormTape((weight, bias, eps), compute_dtype(x, weight))
        rows = x.flatten(0, -2)
        y = torch.empty(rows.shape, dtype=compute_dtype(x, weight), device=x.device)
        with without_autocast(x):
            for part in chunks(len(rows), rows.shape[1], x.device):
                y[part] = tape.forward(rows[part])
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        tape = NormTape((weight, bias, ctx.eps), compute_dtype(x, weight))
        rows, grads = x.flatten(0, -2), dy.flatten(0, -2)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        with without_autocast(x):
            for part in chunks(len(rows), rows.shape[1], x.device):
                tape.forward(rows[part])
                dx[part] = tape.backward(grads[part])
        return dx.view(x.shape), *tape.gradients()
