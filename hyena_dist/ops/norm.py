"""Layer normalisation over the channels, in chunks of tokens.

A norm stands before a product. There it is a part of the product's own function (`ops.linear`, `ops.mlp`,
`ops.hyena`), which recomputes it from its input, so that what it gives is never stored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.backends import norm_kernels
from hyena_dist.ops.chunking import chunks
from hyena_dist.ops.precision import accumulate, compute_dtype, without_autocast


class NormWeights(NamedTuple):
    """What a layer norm is besides its input: weight and bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float
    backend: str = "auto"
    """What computes it: auto, torch or triton (`ops.backends`)."""


NormArguments = tuple[Tensor | None, Tensor | None, float, str]
"""The fields of NormWeights, as an autograd function takes them, one argument each; NO_NORM is no norm."""

NO_NORM: NormArguments = (None, None, 0.0, "torch")


class NormTape:
    """A norm of chunks of tokens and its gradients, summed over the chunks. Without weights it is the identity.

    torch's own kernel sums a weight's gradient over all tokens in one run on a CPU, which at a million tokens in
    float32 is wrong in the third digit; sums of chunks are not.
    """

    def __init__(self, norm: NormArguments, dtype: torch.dtype, product: torch.dtype, *, padding: int = 0) -> None:
        """`dtype`: of computation; `product`: of the product that reads the norm; `padding`: columns, a multiple of 8,
        that the product would like after the channels (`ops.linear.with_bias`)."""
        weight, bias, self._eps, backend = norm
        self.dtype, self._product = dtype, product
        self._weights = None if weight is None or bias is None else (weight.to(dtype), bias.to(dtype))
        self._origin = weight
        self._sums: Sequence[Tensor] = ()  # gradients at weight and bias; the kernels give both in one tensor, [2, D]
        self._kernels = None if weight is None else norm_kernels(backend, weight.device, dtype, len(weight))
        self.reads = product if self._kernels else dtype
        """The dtype of the gradients that `backward` takes as they are."""
        whole = weight is not None and len(weight) % 8 == 0  # else rows do not begin at multiples of 16 bytes
        asked_for = backend == "triton"  # `auto` takes no way that was not measured
        self.padding = padding if self._kernels and asked_for and product.itemsize == 2 and whole else 0
        """The columns that `forward` does add to each row, a 1 and zeros: the kernels write them as they go, while
        torch would copy the rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] or [R, T, D] -> the same, normalised, in the dtype of the product, with `padding` more columns; what
        `backward` needs is kept until the next call."""
        if self._weights is None:
            return x.to(self._product)
        if self._kernels:
            self._x = x
            return self._kernels.forward(x, *self._weights, self._eps, self._product, self.padding)
        self._x = x.flatten(0, -2).to(self.dtype)
        y, self._mean, self._rstd = torch.native_layer_norm(self._x, x.shape[-1:], *self._weights, self._eps)
        return y.to(self._product).view(x.shape)

    def backward(self, dy: Tensor, dx: Tensor, residual: Tensor | None = None) -> None:
        """Write to dx the gradient at what the last `forward` read, given the gradient dy at what it returned, padding
        aside. `residual` is added. dx and `residual` have the shape that `forward` read; dy has that or [R T, D]."""
        if self._weights is not None and self._kernels:
            sums = self._kernels.backward(self._x, dy, self._weights[0], self._eps, dx, residual)
            self._sums = self._sums.add_(sums) if isinstance(self._sums, Tensor) else sums
            return
        if self._weights is not None:
            dy, *grads = torch.ops.aten.native_layer_norm_backward(
                dy.flatten(0, -2).to(self.dtype), self._x, dx.shape[-1:], self._mean, self._rstd, *self._weights,
                [True, True, True])
            before = self._sums or (None, None)
            self._sums = [accumulate(total, grad) for total, grad in zip(before, grads, strict=True)]
        if residual is None:
            dx.copy_(dy.view(dx.shape))
        else:
            torch.add(dy.view(dx.shape), residual, out=dx)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, None, None]:
        """What an autograd function returns for NormArguments: the gradients at the weight and the bias, and None for
        the two that have no gradient."""
        if self._origin is None or not len(self._sums):
            return None, None, None, None
        weight, bias = self._sums
        return weight.to(self._origin.dtype), bias.to(self._origin.dtype), None, None


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
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.norm, dtype = rest, compute_dtype(x, weight)
        tape = NormTape((weight, bias, *rest), dtype, dtype)
        rows = x.flatten(0, -2)
        y = torch.empty(rows.shape, dtype=dtype, device=x.device)
        with without_autocast(x):
            for part in chunks(len(rows), rows.shape[1], x.device):
                y[part] = tape.forward(rows[part])
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dtype = compute_dtype(x, weight)
        tape = NormTape((weight, bias, *ctx.norm), dtype, dtype)
        rows, grads = x.flatten(0, -2), dy.flatten(0, -2)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        with without_autocast(x):
            for part in chunks(len(rows), rows.shape[1], x.device):
                tape.forward(rows[part])
                tape.backward(grads[part], dx[part])
        return dx.view(x.shape), *tape.gradients()
