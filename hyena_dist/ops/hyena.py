"""The Hyena operator of order N, from the norm before it to the product after it, on one context rank:

    x0 | x1 | ... | v = short_conv(in_weight norm(x) + in_bias)
    u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)
    out = out_weight u + out_bias

Legend: l tokens, B batch, D channels of the residual stream, C of them here (D / T on a tensor rank), K taps.

Over several context ranks the convolutions cross ranks, and what stands on either side is in `ops.gates`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.backends import kernels_for
from hyena_dist.ops.chunking import channel_chunks
from hyena_dist.ops.linear import (
    at_channels,
    linear_reference,
    read_channels,
    read_channels_backward,
    write_channels,
    write_channels_backward,
)
from hyena_dist.ops.long_conv import causal_conv_reference, correlate, resolve, transform
from hyena_dist.ops.norm import NO_NORM, NormWeights
from hyena_dist.ops.precision import compute_dtype, product_dtype, without_autocast
from hyena_dist.ops.short_conv import ShortConvTape, short_conv_reference
from hyena_dist.ops.workspace import Workspace

ALL = slice(None)


class HyenaWeights(NamedTuple):
    """in_weight [(N + 1) C, D], in_bias [(N + 1) C], short_weight [(N + 1) C, K], short_bias [(N + 1) C],
    filters h [N - 1, C, l], bias [N - 1, C], out_weight [D, C], out_bias [D] or None."""

    in_weight: Tensor
    in_bias: Tensor
    short_weight: Tensor
    short_bias: Tensor
    filters: Tensor
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor | None


def hyena(x: Tensor, weights: HyenaWeights, norm: NormWeights | None = None, *, residual: bool = False,
          recompute: bool = False, method: str = "auto", backend: str = "auto") -> Tensor:
    """x [l, B, D] -> [l, B, D]. Saves x, the filters and the inner projection [B, (N + 1) C, l], from which the
    backward pass recomputes the rest chunk by chunk, and over which it writes its gradient: a graph is good for one
    backward pass.

    Args:
        residual: add x, not normalised.
        recompute: recompute the projection too.
        method: of the long convolutions (`ops.long_conv`) of torch's operations.
        backend: auto, torch or triton (`ops.backends`).
    """
    options = _Options(residual, recompute, resolve(method, x.device), product_dtype(x), backend)
    return _Hyena.apply(x, options, *weights, *(norm or NO_NORM))


def hyena_reference(x: Tensor, weights: HyenaWeights, norm: NormWeights | None = None) -> Tensor:
    """The same function by the slow references, through autograd."""
    p = linear_reference(x, weights.in_weight, weights.in_bias, norm).permute(1, 2, 0)
    order = len(weights.filters) + 1
    *gates, u = short_conv_reference(p, weights.short_weight, weights.short_bias).chunk(order + 1, dim=1)
    u = u * gates.pop()
    for h, b in zip(weights.filters, weights.bias, strict=True):
        u = causal_conv_reference(u, h, b, gates.pop())
    return linear_reference(u.permute(2, 0, 1), weights.out_weight, weights.out_bias)


class _Options(NamedTuple):
    residual: bool
    recompute: bool
    method: str
    dtype: torch.dtype
    backend: str


class _Hyena(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, options: _Options, *tensors: Any) -> Tensor:
        weights, norm = HyenaWeights(*tensors[:8]), tensors[8:]
        ctx.options, ctx.eps = options, norm[2]
        with without_autocast(x):
            p = write_channels(x, weights.in_weight, weights.in_bias, options.dtype, norm)
            kernels = kernels_for(options.backend, p, weights.filters, weights.short_weight.shape[1])
            y = kernels.mix(p, weights) if kernels else _mix(p, weights, options.method)
            ctx.save_for_backward(x, None if options.recompute else p, *weights, *norm[:2])
            del p
            return read_channels(y, weights.out_weight, weights.out_bias, x if options.residual else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, p, *tensors = ctx.saved_tensors
        weights, norm, options = HyenaWeights(*tensors[:8]), (*tensors[8:], ctx.eps), ctx.options
        with without_autocast(x):
            if p is None:
                p = write_channels(x, weights.in_weight, weights.in_bias, options.dtype, norm)
            dy = at_channels(dout, weights.out_weight, options.dtype)
            kernels = kernels_for(options.backend, p, weights.filters, weights.short_weight.shape[1])
            middle = (kernels.mix_backward(p, dy, weights) if kernels
                      else _mix_backward(p, dy, weights, options.method))
            last = read_channels_backward(dout, dy, weights.out_weight, weights.out_bias)
            del dy
            dx, *first = write_channels_backward(p, x, weights.in_weight, weights.in_bias, norm,
                                                 dout if options.residual else None)
        return dx, None, *first[:2], *middle, *last, *first[2:]


def _mix(p: Tensor, weights: HyenaWeights, method: str) -> Tensor:
    """From the projection [B, (N + 1) C, l] to what the last product reads, [B, C, l]."""
    dtype = compute_dtype(p, weights.filters)
    batch, _, length = p.shape
    filters, channels, _ = weights.filters.shape
    p, short = _blocks(p, weights, Workspace(dtype, p.device), dtype)
    fft = transform(method, length, dtype, p.device)
    y = torch.empty(batch, channels, length, dtype=p.dtype, device=p.device)
    for part in channel_chunks(channels, batch, length, p.device):
        *gates, u = short.forward(p[:, :, part].to(dtype), (ALL, part)).unbind(1)
        u.mul_(gates.pop())
        for h, b in zip(weights.filters[:, part], weights.bias[:, part, None].to(dtype), strict=True):
            conv = fft.inverse(fft.forward(u).mul_(fft.forward(h.to(dtype))))
            torch.addcmul(conv, u, b, out=u).mul_(gates.pop())
        y[:, part] = u
    return y


def _blocks(p: Tensor, weights: HyenaWeights, work: Workspace, dtype: torch.dtype) -> tuple[Tensor, ShortConvTape]:
    """The projection as [B, N + 1, C, l], and its short convolution."""
    blocks = len(weights.filters) + 2, weights.filters.shape[1]
    weight, bias = weights.short_weight.unflatten(0, blocks), weights.short_bias.unflatten(0, blocks)
    return p.unflatten(1, blocks), ShortConvTape(weight, bias, dtype, work)


def _mix_backward(p: Tensor, dy: Tensor, weights: HyenaWeights, method: str) -> tuple[Tensor, ...]:
    """Gradients of `_mix` at the short convolution's weight and bias, the filters and their bias. That at p takes p's
    place, and `_mix(p)` takes dy's."""
    dtype = compute_dtype(p, weights.filters)
    filters, channels, length = weights.filters.shape
    work = Workspace(dtype, p.device)
    p, short = _blocks(p, weights, work, dtype)
    fft = transform(method, length, dtype, p.device)
    dfilters, dbias = torch.empty_like(weights.filters), torch.empty_like(weights.bias)
    for part in channel_chunks(channels, len(p), length, p.device):
        x = p[:, :, part].to(dtype)
        *gates, v = short.forward(x, (ALL, part)).unbind(1)
        dshort = work("dshort", *x.shape)
        *dgates, dv = dshort.unbind(1)  # before they are known, their memory holds u and the convolutions
        u, b = torch.mul(gates[-1], v, out=dv), weights.bias[:, part, None].to(dtype)
        steps = []
        for o in range(filters):
            gate = filters - 1 - o
            spectra = fft.forward(u), fft.forward(weights.filters[o, part].to(dtype))
            conv = torch.addcmul(fft.inverse(spectra[0] * spectra[1]), u, b[o], out=dgates[gate])
            steps.append((u, spectra, conv))
            u = torch.mul(conv, gates[gate], out=work(f"u {o}", *v.shape))
        grad = dy[:, part].to(dtype)
        for o in reversed(range(filters)):
            step_input, spectra, conv = steps.pop()
            gate = filters - 1 - o
            conv.mul_(grad)
            grad = gates[gate].mul_(grad)
            dstep = correlate(fft, grad, *spectra, dfilters[o, part])
            dbias[o, part] = step_input.mul_(grad).sum((0, 2))
            torch.addcmul(dstep, grad, b[o], out=grad)
        dy[:, part] = u
        torch.mul(v, grad, out=dgates[-1])
        torch.mul(gates[-1], grad, out=dv)
        short.backward(dshort, x, (ALL, part), p[:, :, part])
    return short.dweight.flatten(0, 1), short.dbias.flatten(), dfilters, dbias
