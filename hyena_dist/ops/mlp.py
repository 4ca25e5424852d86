"""The MLP with the layer norm before it: y = second_weight gelu(first_weight norm(x) + first_bias) + second_bias.

Works in chunks of tokens, so that the products are all that touches memory: GELU costs a CPU as much as the product
before it when its inner tensor leaves the cache. On a GPU one kernel does all of it, where there is one
(`ops.triton.mlp`). GELU is by tanh, as published.

Legend: D channels, I inner channels (of this tensor rank).
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.backends import gelu_kernels, mlp_kernels
from hyena_dist.ops.chunking import token_chunks
from hyena_dist.ops.linear import linear_reference, write_addends
from hyena_dist.ops.norm import NO_NORM, NormTape, NormWeights
from hyena_dist.ops.precision import (
    accumulate,
    accumulate_product,
    compute_dtype,
    lowered,
    product,
    product_dtype,
    without_autocast,
)
from hyena_dist.ops.workspace import Workspace

# gelu(h) = h sigmoid(h (A + B h^2)), the same function as h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2.
_A = 2 * math.sqrt(2 / math.pi)
_B = 0.044715 * _A


class MLPWeights(NamedTuple):
    """first_weight [I, D], first_bias [I], second_weight [D, I], second_bias [D] or None."""

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor | None


def mlp(x: Tensor, weights: MLPWeights, norm: NormWeights | None = None, *, residual: bool = False,
        recompute: bool = False, backend: str = "auto") -> Tensor:
    """x [..., D] -> [..., D]. Saves x and the first product [..., I]; with `recompute`, or where one kernel does it
    all, x only. With `residual` it adds x, not normalised. `backend`: of the whole or of GELU (`ops.backends`)."""
    dtype, recompute = product_dtype(x), recompute or not torch.is_grad_enabled()
    if (kernels := mlp_kernels(backend, x.device, dtype, x.shape[-1])) is not None:
        return _OneKernel.apply(x, kernels, residual, dtype, *weights, *(norm or NO_NORM))
    options = _Options(residual, recompute, dtype, gelu_kernels(backend, x.device, dtype))
    return _MLP.apply(x, options, *weights, *(norm or NO_NORM))


def mlp_reference(x: Tensor, weights: MLPWeights, norm: NormWeights | None = None) -> Tensor:
    """The same function by torch, through autograd."""
    inner = F.gelu(linear_reference(x, weights.first_weight, weights.first_bias, norm), approximate="tanh")
    return F.linear(inner, weights.second_weight, weights.second_bias)


class _Options(NamedTuple):
    residual: bool
    recompute: bool
    dtype: torch.dtype
    kernels: ModuleType | None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, options: _Options, *tensors: Any) -> Tensor:
        norm, (residual, recompute, dtype, kernels) = tensors[4:], options
        first, first_bias, second, second_bias = lowered(dtype, *tensors[:4])
        tape, rows = NormTape(norm, compute_dtype(x, first), dtype), x.flatten(0, -2)
        inner = None if recompute else torch.empty(len(rows), len(first), dtype=dtype, device=x.device)
        kind = torch.promote_types(dtype, x.dtype) if residual else dtype
        y = torch.empty(rows.shape, dtype=kind, device=x.device)
        work = Workspace(dtype, x.device)
        with without_autocast(x):
            for part in token_chunks(len(rows), len(first), x.device):
                n = tape.forward(rows[part])
                h = torch.addmm(first_bias, n, first.t(),
                                out=work("h", len(n), len(first)) if inner is None else inner[part])
                _second_product(_gelu(h, work, kernels), second, second_bias, rows[part] if residual else None, y[part])
        ctx.save_for_backward(x, inner, *tensors[:4], *norm[:2])
        ctx.options, ctx.norm = options, norm[2:]
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, *tensors = ctx.saved_tensors
        weights, norm = MLPWeights(*tensors[:4]), (*tensors[4:], *ctx.norm)
        residual, _, dtype, kernels = ctx.options
        first, second = lowered(dtype, weights.first_weight, weights.second_weight)
        tape = NormTape(norm, compute_dtype(x, first), dtype)
        rows, grads = x.flatten(0, -2), dy.flatten(0, -2)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        dfirst = dfirst_bias = dsecond = None
        work = Workspace(dtype, x.device)
        with without_autocast(x):
            for part in token_chunks(len(rows), len(first), x.device):
                n, g = tape.forward(rows[part]), grads[part].to(dtype)
                wide = len(n), len(first)
                if inner is None:
                    h = torch.addmm(weights.first_bias.to(dtype), n, first.t(), out=work("h", *wide))
                else:
                    h = inner[part]
                da = torch.mm(g, second, out=work("da", *wide))
                if kernels:
                    a, dh = work("a", *wide), da
                    dbias = kernels.backward(h, dh, a).to(weights.first_bias.dtype)
                else:
                    a, dh = _gelu_backward(h, da, work)
                    dbias = dh.sum(0, dtype=weights.first_bias.dtype)
                dsecond = accumulate_product(dsecond, g.t(), a, weights.second_weight.dtype)
                dfirst = accumulate_product(dfirst, dh.t(), n, weights.first_weight.dtype)
                dfirst_bias = accumulate(dfirst_bias, dbias)
                dn = (torch.mm(dh, first, out=work("dn", *n.shape)) if dtype == tape.reads
                      else product(dh, first, tape.reads))
                tape.backward(dn, dx[part], grads[part] if residual else None)
            dsecond_bias = None if weights.second_bias is None else grads.sum(0, dtype=weights.second_bias.dtype)
        return dx.view(x.shape), None, dfirst, dfirst_bias, dsecond, dsecond_bias, *tape.gradients()


class _OneKernel(torch.autograd.Function):
    """The same by `ops.triton.mlp`, in chunks of tokens in the backward pass alone."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: ModuleType, residual: bool, dtype: torch.dtype, *tensors: Any) -> Tensor:
        rows, lower = x.flatten(0, -2).contiguous(), _contiguous(*lowered(dtype, *tensors[:4]))
        norm = _contiguous(*lowered(torch.float32, *tensors[4:6]))
        y = torch.empty(rows.shape, dtype=torch.promote_types(dtype, x.dtype) if residual else dtype, device=x.device)
        kernels.forward(rows, *norm, tensors[6], *lower, residual, y)
        ctx.save_for_backward(x, *tensors[:6])
        ctx.options = kernels, residual, dtype, tensors[6:]
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, *tensors), (kernels, residual, dtype, norm) = ctx.saved_tensors, ctx.options
        first, first_bias, second, _ = _contiguous(*lowered(dtype, *tensors[:4]))
        tape = NormTape((*tensors[4:], *norm), compute_dtype(x, tensors[0]), dtype)
        rows, grads = x.flatten(0, -2), dy.flatten(0, -2).contiguous()
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        dfirst = dsecond = None
        sums = torch.zeros(sum(first.shape), dtype=torch.float32, device=x.device)
        work, (inner, width) = Workspace(dtype, x.device), first.shape
        with without_autocast(x):
            for part in token_chunks(len(rows), inner, x.device):
                n, g = tape.forward(rows[part]).contiguous(), grads[part]
                lower = None if g.dtype == dtype else work("g", len(n), width)
                a, dh = work("a", len(n), inner), work("dh", len(n), inner)
                dn = torch.empty(n.shape, dtype=tape.reads, device=x.device)
                found = kernels.backward(n, g, first, first_bias, second, a, dh, dn, lower)
                dfirst = accumulate_product(dfirst, dh.t(), n, tensors[0].dtype)
                dsecond = accumulate_product(dsecond, (g if lower is None else lower).t(), a, tensors[2].dtype)
                sums += found
                tape.backward(dn, dx[part], g if residual else None)
        dfirst_bias, dsecond_bias = sums.split([inner, width])
        return (dx.view(x.shape), None, None, None, dfirst, dfirst_bias.to(tensors[1].dtype), dsecond,
                None if tensors[3] is None else dsecond_bias.to(tensors[3].dtype), *tape.gradients())


def _contiguous(*tensors: Any) -> list[Any]:
    return [t if t is None else t.contiguous() for t in tensors]


def _second_product(a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """y = residual + weight a + bias, where y may be wider than the product."""
    if y.dtype == a.dtype:
        accumulate_product(write_addends(y, residual, bias), a, weight.t(), y.dtype)
        return
    product = a.mm(weight.t()) if bias is None else torch.addmm(bias, a, weight.t())
    if residual is None:
        y.copy_(product)
    else:
        torch.add(residual, product, out=y)


def _gelu(h: Tensor, work: Workspace, kernels: ModuleType | None) -> Tensor:
    if kernels:
        a = work("a", *h.shape)
        kernels.forward(h, a)
        return a
    if not _by_sigmoid(h):
        return F.gelu(h, approximate="tanh")
    return torch.addcmul(h.new_tensor(_A), h, h, value=_B, out=work("s", *h.shape)).mul_(h).sigmoid_().mul_(h)


def _gelu_backward(h: Tensor, da: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """a = gelu(h) and the gradient at h from that at a, which is overwritten."""
    if not _by_sigmoid(h):
        a = torch.ops.aten.gelu.out(h, approximate="tanh", out=work("a", *h.shape))
        return a, torch.ops.aten.gelu_backward.grad_input(da, h, approximate="tanh", grad_input=da)
    constant, shape = h.new_tensor(_A), h.shape
    s = torch.addcmul(constant, h, h, value=_B, out=work("s", *shape)).mul_(h).sigmoid_()
    a = torch.mul(s, h, out=work("a", *shape))
    # gelu' = s + a (1 - s) (A + 3 B h^2)
    slope = torch.addcmul(a, a, s, value=-1, out=work("slope", *shape))
    factor = torch.addcmul(constant, h, h, value=3 * _B, out=work("factor", *shape))
    return a, torch.addcmul(s, slope, factor, out=factor).mul_(da)


def _by_sigmoid(h: Tensor) -> bool:
    """On a CPU torch's tanh takes three times as long as its sigmoid; elsewhere its own GELU is one pass."""
    return h.device.type == "cpu" and h.dtype.itemsize >= 4
