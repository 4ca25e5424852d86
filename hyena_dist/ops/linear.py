"""A matrix product over the channels, with the layer norm before it: y = W norm(x) + b.

Saves x only, and works in chunks of tokens, so that a norm's output never leaves the cache. Products are in autocast's
dtype where it is on, norms and the sums of gradients in float32 (float64 for float64).

Legend: l tokens, B batch, I and O channels in and out.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import row_chunks, token_chunks
from hyena_dist.ops.norm import NO_NORM, NormArguments, NormTape, NormWeights, layer_norm_reference
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

PADDING = 8
"""Columns after the channels of a token's row where the bias is a column of the weight: a 1, which the bias multiplies,
and zeros, because products want multiples of 8."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: NormWeights | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]; with `norm` of the normalised x."""
    return _Linear.apply(x, weight, bias, product_dtype(x), *(norm or NO_NORM))


def to_channels(x: Tensor, weight: Tensor, bias: Tensor, norm: NormWeights | None = None) -> Tensor:
    """x [l, B, I], weight [O, I], bias [O] -> [B, O, l]: the product is written channels first."""
    return _ToChannels.apply(x, weight, bias, product_dtype(x), *(norm or NO_NORM))


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: NormWeights | None = None) -> Tensor:
    """The same function as `linear` by torch, through autograd."""
    return torch.nn.functional.linear(x if norm is None else layer_norm_reference(x, norm), weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
                *norm: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias, *norm[:2])
        ctx.dtype, ctx.norm = dtype, norm[2:]
        tape = NormTape(norm, compute_dtype(x, weight), dtype)
        rows, w = x.flatten(0, -2), weight.to(dtype).t()
        b = None if bias is None else bias.to(dtype)
        y = torch.empty(len(rows), len(weight), dtype=dtype, device=x.device)
        with without_autocast(x):
            for part in token_chunks(len(rows), max(weight.shape), x.device):
                n = tape.forward(rows[part])
                torch.mm(n, w, out=y[part]) if b is None else torch.addmm(b, n, w, out=y[part])
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *norm = ctx.saved_tensors
        tape = NormTape((*norm, *ctx.norm), compute_dtype(x, weight), ctx.dtype)
        rows, grads, w = x.flatten(0, -2), dy.flatten(0, -2), weight.to(ctx.dtype)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        dweight = dbias = None
        with without_autocast(x):
            for part in token_chunks(len(rows), max(weight.shape), x.device):
                n, g = tape.forward(rows[part]), grads[part]
                tape.backward(product(g, w, tape.reads), dx[part])
                dweight = accumulate_product(dweight, g.t(), n, weight.dtype)
                if bias is not None:
                    dbias = accumulate(dbias, g.sum(0, dtype=bias.dtype))
        return dx.view(x.shape), dweight, dbias, None, *tape.gradients()


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """weight [O, I], bias [O] -> [O, I + PADDING], whose product with padded rows is that of the weight plus the
    bias."""
    zeros = _zero(weight.dtype, weight.device).expand(len(weight), PADDING - 1)
    return torch.cat([weight, bias[:, None], zeros], dim=1)


@lru_cache
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def linear_to_channels(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, norm: NormArguments) -> Tensor:
    """`to_channels`, outside autograd and with autocast off.

    Where the norm writes padded rows, the bias is a column of the weight, and no pass over the result adds it.
    """
    length, batch, _ = x.shape
    tape = NormTape(norm, compute_dtype(x, weight), dtype, padding=PADDING)
    w = (with_bias(weight, bias) if tape.padding else weight).to(dtype)
    b = None if tape.padding else bias.to(dtype)[:, None]
    p = torch.empty(batch, len(weight), length, dtype=dtype, device=x.device)
    work = Workspace(dtype, x.device)
    for rows, tokens in row_chunks(batch, length, len(weight), x.device):
        n = tape.forward(_by_row(x, rows, tokens))
        if b is None:
            torch.bmm(w.expand(len(n), -1, -1), n.transpose(1, 2), out=p[rows, :, tokens])
        else:
            product = torch.mm(w, n.flatten(0, 1).t(), out=work("product", len(weight), n.shape[0] * n.shape[1]))
            torch.add(product.unflatten(1, n.shape[:2]).transpose(0, 1), b, out=p[rows, :, tokens])
    return p


def linear_to_channels_backward(dp: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm: NormArguments,
                                dresidual: Tensor | None = None) -> tuple[Any, ...]:
    """Gradients of `linear_to_channels` at x, weight and bias, and what `NormTape.gradients` returns for the norm,
    given the gradient dp at its result, [B, O, l]. `dresidual` [l, B, I] is added to the gradient at x."""
    length, batch, width = x.shape
    tape, w = NormTape(norm, compute_dtype(x, weight), dp.dtype, padding=PADDING), weight.to(dp.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias, work = None, None, Workspace(dp.dtype, x.device)
    for rows, tokens in row_chunks(batch, length, len(weight), x.device):
        n = tape.forward(_by_row(x, rows, tokens)).flatten(0, 1)
        piece = dp[rows, :, tokens].transpose(0, 1)
        if len(piece[0]) > 1 or piece.device.type == "cpu":  # a GPU's products read one row where it is
            piece = work("g", *piece.shape).copy_(piece)
        g = piece.flatten(1)  # [O, rows tokens]
        tape.backward(torch.mm(g.t(), w, out=work("dn", len(n), width)), _by_row(dx, rows, tokens),
                      None if dresidual is None else _by_row(dresidual, rows, tokens))
        dweight = accumulate_product(dweight, g, n, weight.dtype)
        if not tape.padding:
            dbias = accumulate(dbias, g.sum(1, dtype=bias.dtype))
    if tape.padding and dweight is not None:  # the gradient at `with_bias`
        dweight, dbias = dweight[:, :width], dweight[:, width].to(bias.dtype)
    return dx, dweight, dbias, *tape.gradients()


def _by_row(x: Tensor, rows: slice, tokens: slice) -> Tensor:
    """[l, B, I] -> [rows, tokens, I], the same memory."""
    return x[tokens, rows].transpose(0, 1)


def linear_from_channels(y: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                         kernels: ModuleType | None = None) -> Tensor:
    """The product of y [B, I, l], whose channels come before its tokens, [l, B, O], in its dtype, plus `residual`
    [l, B, O], which may be of a wider dtype and makes the result so; outside autograd and with autocast off.
    `kernels`: those of `ops.triton.project`; None: torch's operations."""
    batch, _, length = y.shape
    if kernels:
        kind = y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype)
        out = torch.empty(length, batch, len(weight), dtype=kind, device=y.device)
        kernels.forward(y, weight.to(y.dtype), bias, residual, out)
        return out
    added = None if residual is None or residual.dtype != y.dtype else residual
    w, b = lowered(y.dtype, weight.t(), bias)
    if added is None and b is not None and batch == 1:
        out = torch.addmm(b, y[0].t(), w)[:, None]  # which adds the bias as it goes
    else:
        out = torch.empty(length, batch, len(weight), dtype=y.dtype, device=y.device)
        write_addends(out, added, b)
        rows = out.transpose(0, 1)
        torch.baddbmm(rows, y.transpose(1, 2), w.expand(batch, -1, -1), out=rows)
    return out if residual is None or added is not None else out + residual


def write_addends(y: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """Write to y what a product is to be added to: the residual and the bias, where there are any, else zeros."""
    if residual is None:
        return y.zero_() if bias is None else y.copy_(bias)
    return y.copy_(residual) if bias is None else torch.add(residual, bias, out=y)


def linear_from_channels_input_gradients(dout: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
                                         kernels: ModuleType | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient dout [l, B, O] at the result of `linear_from_channels`, whose product is of `dtype`: the
    gradient at y [B, I, l], dout in `dtype`, and the gradient at the bias. `kernels` as there."""
    length, batch, _ = dout.shape
    if kernels:
        dy = torch.empty(batch, weight.shape[1], length, dtype=dtype, device=dout.device)
        g = None if dout.dtype == dtype else torch.empty(dout.shape, dtype=dtype, device=dout.device)
        total = kernels.backward(dout, weight.to(dtype), dy, g)
        return dy, dout if g is None else g, None if bias is None else total.to(bias.dtype)
    g = dout.to(dtype)
    dy = torch.bmm(weight.to(dtype).t().expand(batch, -1, -1), g.permute(1, 2, 0))
    return dy, g, None if bias is None else g.sum((0, 1), dtype=bias.dtype)


def linear_from_channels_weight_gradient(g: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `linear_from_channels` at its weight, from that at its result in the dtype of y."""
    return torch.bmm(g.permute(1, 2, 0), y.transpose(1, 2)).sum(0, dtype=weight.dtype)


class _ToChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype,
                *norm: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias, *norm[:2])
        ctx.norm = norm[2:]
        with without_autocast(x):
            return linear_to_channels(x, weight, bias, dtype, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *norm = ctx.saved_tensors
        with without_autocast(x):
            dx, dweight, dbias, *dnorm = linear_to_channels_backward(dp, x, weight, bias, (*norm, *ctx.norm))
        return dx, dweight, dbias, None, *dnorm
