"""The Hyena operator of order N, from the norm before it to the product after it, on one context rank:

    x0 | x1 | ... | v = short_conv(in_weight norm(x) + in_bias)
    u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)
    out = out_weight u + out_bias

Legend: l tokens, B batch, D channels of the residual stream, C of them here (D / T on a tensor rank), K taps.

Over several context ranks the convolutions cross ranks, and what stands on either side is in `ops.gates`.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.backends import kernels_for
from hyena_dist.ops.chunking import channel_chunks
from hyena_dist.ops.folded import fold, fold_backward, folded_linear, folded_linear_backward, folds
from hyena_dist.ops.linear import (
    linear_from_channels,
    linear_from_channels_input_gradient,
    linear_from_channels_weight_gradients,
    linear_reference,
    linear_to_channels,
    linear_to_channels_backward,
)
from hyena_dist.ops.long_conv import causal_conv_reference, correlate, resolve, transform
from hyena_dist.ops.norm import NO_NORM, NormArguments, NormWeights
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
    dtype = product_dtype(x)
    kernels = kernels_for(backend, x.device, dtype, weights.filters, weights.short_weight.shape[1])
    options = _Options(residual, recompute, resolve(method, x.device), dtype, kernels,
                       kernels is None and folds(x.device, dtype))
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
    kernels: ModuleType | None
    folded: bool


class _Hyena(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, options: _Options, *tensors: Any) -> Tensor:
        weights, norm = HyenaWeights(*tensors[:8]), tensors[8:]
        ctx.options, ctx.norm = options, norm[2:]
        with without_autocast(x):
            p = _project(x, weights, options, norm)
            y = options.kernels.mix(p, weights) if options.kernels else _mix(p, weights, options)
            ctx.save_for_backward(x, None if options.recompute else p, *weights, *norm[:2])
            del p
            return linear_from_channels(y, weights.out_weight, weights.out_bias, x if options.residual else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, p, *tensors = ctx.saved_tensors
        weights, norm, options = HyenaWeights(*tensors[:8]), (*tensors[8:], *ctx.norm), ctx.options
        with without_autocast(x):
            if p is None:
                p = _project(x, weights, options, norm)
            dproduct = dout.to(options.dtype)
            dy = linear_from_channels_input_gradient(dproduct, weights.out_weight)
            *dshort, dfilters, dbias = (options.kernels.mix_backward(p, dy, weights) if options.kernels
                                        else _mix_backward(p, dy, weights, options))
            last = linear_from_channels_weight_gradients(dproduct, dy, weights.out_weight, weights.out_bias)
            del dproduct, dy
            dx, din, dnorm = _project_backward(p, x, weights, options, norm, dout if options.residual else None)
        return dx, None, *din, *dshort, dfilters, dbias, *last, *dnorm


def _project(x: Tensor, weights: HyenaWeights, options: _Options, norm: NormArguments) -> Tensor:
    """x [l, B, D] -> the projection [B, (N + 1) C, l], with the short convolution where that is folded into it."""
    if options.folded:
        return folded_linear(x, fold(*weights[:4], options.dtype), norm)
    return linear_to_channels(x, weights.in_weight, weights.in_bias, options.dtype, norm)


def _project_backward(dp: Tensor, x: Tensor, weights: HyenaWeights, options: _Options, norm: NormArguments,
                      dresidual: Tensor | None) -> tuple[Tensor, list[Tensor], list[Any]]:
    """Gradients of `_project` at x, at the weights that it reads, and at the three of `norm`."""
    if options.folded:
        folded = fold(*weights[:4], options.dtype)
        dx, dfolded, *dnorm = folded_linear_backward(dp, x, folded, norm, dresidual)
        return dx, list(fold_backward(dfolded, *weights[:3])), dnorm
    dx, dweight, dbias, *dnorm = linear_to_channels_backward(dp, x, weights.in_weight, weights.in_bias, norm, dresidual)
    return dx, [dweight, dbias], dnorm


def _mix(p: Tensor, weights: HyenaWeights, options: _Options) -> Tensor:
    """From what `_project` gives, [B, (N + 1) C, l] to what the last product reads, [B, C, l]."""
    dtype = compute_dtype(p, weights.filters)
    batch, _, length = p.shape
    filters, channels, _ = weights.filters.shape
    work = Workspace(dtype, p.device)
    p, short = p.unflatten(1, (-1, channels)), _ShortConv(weights, options, work, dtype)
    fft = transform(options.method, length, dtype, p.device)
    y = torch.empty(batch, channels, length, dtype=p.dtype, device=p.device)
    for part in channel_chunks(channels, batch, length, p.device):
        *gates, v = short.forward(p[:, :, part], part)
        u = torch.mul(v.to(dtype), gates.pop(), out=work("u", *v.shape))
        for h, b in zip(weights.filters[:, part], weights.bias[:, part, None].to(dtype), strict=True):
            conv = fft.inverse(fft.forward(u).mul_(fft.forward(h.to(dtype))))
            conv, gate = torch.addcmul(conv, u, b, out=u), gates.pop()
            torch.mul(conv, gate, out=conv if gates else y[:, part])
    return y


class _ShortConv:
    """The short convolution of chunks of channels, where it is not folded into the projection [B, N + 1, C, l]."""

    def __init__(self, weights: HyenaWeights, options: _Options, work: Workspace, dtype: torch.dtype) -> None:
        blocks = len(weights.filters) + 2, weights.filters.shape[1]
        self._tape = None if options.folded else ShortConvTape(
            weights.short_weight.unflatten(0, blocks), weights.short_bias.unflatten(0, blocks), dtype, work)
        self._dtype = dtype

    def forward(self, x: Tensor, part: slice) -> tuple[Tensor, ...]:
        """[B, N + 1, c, l] -> x0, x1, ..., v, each [B, c, l]."""
        return (x if self._tape is None else self._tape.forward(x.to(self._dtype), (ALL, part))).unbind(1)

    def backward(self, dy: Tensor, x: Tensor, part: slice) -> None:
        """Writes the gradient at x over it."""
        if self._tape is None:
            x.copy_(dy)
        else:
            self._tape.backward(dy, x.to(self._dtype), (ALL, part), x)

    def gradients(self) -> list[Tensor]:
        """Those at the weight and the bias."""
        return [] if self._tape is None else [self._tape.dweight.flatten(0, 1), self._tape.dbias.flatten()]


def _mix_backward(p: Tensor, dy: Tensor, weights: HyenaWeights, options: _Options) -> tuple[Tensor, ...]:
    """Gradients of `_mix` at the short convolution's weight and bias where it is not folded, at the filters and at
    their bias. That at p takes p's place, and `_mix(p)` takes dy's."""
    dtype = compute_dtype(p, weights.filters)
    filters, channels, length = weights.filters.shape
    work = Workspace(dtype, p.device)
    p, short = p.unflatten(1, (-1, channels)), _ShortConv(weights, options, work, dtype)
    fft = transform(options.method, length, dtype, p.device)
    dfilters, dbias = torch.empty_like(weights.filters), torch.empty_like(weights.bias)
    for part in channel_chunks(channels, len(p), length, p.device):
        x = p[:, :, part]
        *gates, v = short.forward(x, part)
        dshort = work("dshort", *x.shape)
        *dgates, dv = dshort.unbind(1)  # before they are known, their memory holds u and the convolutions
        u, b = torch.mul(gates[-1].to(dtype), v, out=dv), weights.bias[:, part, None].to(dtype)
        steps, grad = [], work("grad", *v.shape).copy_(dy[:, part])  # y takes its place
        for o in range(filters):
            gate = filters - 1 - o
            spectra = fft.forward(u), fft.forward(weights.filters[o, part].to(dtype))
            conv = torch.addcmul(fft.inverse(spectra[0] * spectra[1]), u, b[o], out=dgates[gate])
            steps.append((u, spectra, conv))
            u = torch.mul(conv, gates[gate], out=work(f"u {o}", *v.shape) if gate else dy[:, part])
        for o in reversed(range(filters)):
            step_input, spectra, conv = steps.pop()
            gate = filters - 1 - o
            conv.mul_(grad)
            grad = grad.mul_(gates[gate])
            dstep = correlate(fft, grad, *spectra, dfilters[o, part])
            dbias[o, part] = step_input.mul_(grad).sum((0, 2))
            torch.addcmul(dstep, grad, b[o], out=grad)
        torch.mul(v, grad, out=dgates[-1])
        torch.mul(gates[-1], grad, out=dv)
        short.backward(dshort, x, part)
    return *short.gradients(), dfilters, dbias
