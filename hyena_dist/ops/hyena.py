"""The Hyena operator of order N, from the norm before it to the product after it:

    p = in_weight norm(x) + in_bias
    y = mix(p): the short convolution, the gates and the long convolutions (`ops.mix`)
    out = out_weight y + out_bias

It is one function on one context rank and on several: what computes `mix` is a backend, and the convolutions of a slice
of the tokens cross the ranks by an `Exchange`.

Legend: l tokens, B batch, D channels of the residual stream, C of them here (D / T on a tensor rank), K taps.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.across import Across, Exchange
from hyena_dist.ops.backends import across_kernels, mix_kernels, project_kernels
from hyena_dist.ops.chunked import Chunked
from hyena_dist.ops.folded import fold, fold_backward, folded_linear, folded_linear_backward, folds
from hyena_dist.ops.linear import (
    linear_from_channels,
    linear_from_channels_input_gradients,
    linear_from_channels_weight_gradient,
    linear_reference,
    linear_to_channels,
    linear_to_channels_backward,
)
from hyena_dist.ops.long_conv import resolve
from hyena_dist.ops.mix import Asked, Backend, MixWeights, check_filters, mix_reference
from hyena_dist.ops.norm import NO_NORM, NormArguments, NormWeights
from hyena_dist.ops.precision import product_dtype, without_autocast
from hyena_dist.ops.segments import Offsets, Segments, segments_of


class HyenaWeights(NamedTuple):
    """in_weight [(N + 1) C, D], in_bias [(N + 1) C], short_weight [(N + 1) C, K], short_bias [(N + 1) C],
    filters h [N - 1, C, l], bias [N - 1, C], out_weight [D, C], out_bias [D] or None. With an exchange, the filters
    have the channels and lags that it asks for."""

    in_weight: Tensor
    in_bias: Tensor
    short_weight: Tensor
    short_bias: Tensor
    filters: Tensor
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor | None

    def of_mix(self, *, folded: bool = False) -> MixWeights:
        """The weights of `mix`; without the short convolution's where that is folded into the projection."""
        return MixWeights(None if folded else self.short_weight, None if folded else self.short_bias, self.filters,
                          self.bias)


def hyena(x: Tensor, weights: HyenaWeights, norm: NormWeights | None = None, *, residual: bool = False,
          recompute: bool = False, method: str = "auto", backend: str = "auto",
          segments: Offsets | Segments | None = None, exchange: Exchange | None = None) -> Tensor:
    """x [l, B, D] -> [l, B, D]. Saves x, the filters or their spectra, and the inner projection [B, (N + 1) C, l], from
    which the backward pass recomputes the rest chunk by chunk, and over which it writes its gradient: a graph is good
    for one backward pass. With an exchange it also saves what that keeps, and the last convolution.

    Args:
        residual: add x, not normalised.
        recompute: do not save the projection, recompute it.
        method: of the long convolutions (`ops.long_conv`) of torch's operations.
        backend: a value of `ops.backend` (`ops.backends`).
        segments: sequences in the rows that no convolution crosses the borders of (`ops.segments`); with an exchange
            those of the whole rows, not of the slice.
        exchange: where x is a slice of the tokens, how the convolutions cross the context ranks.

    Raises:
        ValueError: segments that do not fit the tokens or the filters, or a slice that the exchange cannot serve.
    """
    dtype = product_dtype(x)
    segments = segments_of(segments, x.shape[1], len(x) * (1 if exchange is None else exchange.ranks))
    asked = Asked(x.device, torch.float64 if weights.filters.dtype == torch.float64 else dtype,
                  order=len(weights.filters) + 1, taps=weights.short_weight.shape[1], length=len(x),
                  segmented=segments is not None)
    if exchange is not None:
        chosen: Backend = Across(exchange, across_kernels(backend, asked))
        if reason := chosen.refusal(asked):
            raise ValueError(reason)
        folded = False
    else:
        check_filters(weights.filters, segments, len(x))
        kernels = mix_kernels(backend, asked)
        chosen = kernels or Chunked(resolve(method, x.device))
        folded = kernels is None and segments is None and folds(x.device, dtype)
    last = project_kernels(backend, x.device, dtype, len(weights.out_weight))
    options = _Options(residual, recompute, dtype, chosen, folded, segments, last)
    return _Hyena.apply(x, options, *weights, *(norm or NO_NORM))


def hyena_reference(x: Tensor, weights: HyenaWeights, norm: NormWeights | None = None,
                    segments: Offsets | None = None) -> Tensor:
    """The same function by the slow references, through autograd."""
    p = linear_reference(x, weights.in_weight, weights.in_bias, norm).permute(1, 2, 0)
    y = mix_reference(p, weights.of_mix(), segments_of(segments, len(p), p.shape[2]))
    return linear_reference(y.permute(2, 0, 1), weights.out_weight, weights.out_bias)


class _Options(NamedTuple):
    residual: bool
    recompute: bool
    dtype: torch.dtype
    """Of the two products."""
    backend: Backend
    folded: bool
    segments: Segments | None
    last: ModuleType | None
    """Kernels of the last product."""


class _Hyena(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, options: _Options, *tensors: Any) -> Tensor:
        weights, norm = HyenaWeights(*tensors[:8]), tensors[8:]
        ctx.options, ctx.norm = options, norm[2:]
        with without_autocast(x):
            p = _project(x, weights, options, norm)
            y, kept = options.backend.mix(p, weights.of_mix(folded=options.folded), options.segments)
            if options.backend.keeps_spectra:  # of the filters the shape is enough
                weights = weights._replace(filters=weights.filters.new_empty(()).expand(weights.filters.shape))
            ctx.save_for_backward(x, None if options.recompute else p, *weights, *norm[:2], *kept)
            del p, kept
            return linear_from_channels(y, weights.out_weight, weights.out_bias, x if options.residual else None,
                                        options.last)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, p, *tensors = ctx.saved_tensors
        weights, norm, kept = HyenaWeights(*tensors[:8]), (*tensors[8:10], *ctx.norm), tensors[10:]
        options = ctx.options
        del tensors
        with without_autocast(x):
            if p is None:
                p = _project(x, weights, options, norm)
            dy, g, dbias = linear_from_channels_input_gradients(dout, weights.out_weight, weights.out_bias,
                                                                options.dtype, options.last)
            mixed = options.backend.mix_backward(p, dy, weights.of_mix(folded=options.folded), options.segments, kept)
            del kept
            dweight = linear_from_channels_weight_gradient(g, dy, weights.out_weight)  # dy holds mix(p) by now
            del g, dy
            dx, din, dshort, dnorm = _project_backward(p, x, weights, options, norm,
                                                       dout if options.residual else None)
        return dx, None, *din, *(dshort or mixed[:2]), *mixed[2:], dweight, dbias, *dnorm


def _project(x: Tensor, weights: HyenaWeights, options: _Options, norm: NormArguments) -> Tensor:
    """x [l, B, D] -> the projection [B, (N + 1) C, l], with the short convolution where that is folded into it."""
    if options.folded:
        return folded_linear(x, fold(*weights[:4], options.dtype), norm)
    return linear_to_channels(x, weights.in_weight, weights.in_bias, options.dtype, norm)


def _project_backward(dp: Tensor, x: Tensor, weights: HyenaWeights, options: _Options, norm: NormArguments,
                      dresidual: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor], list[Any]]:
    """Gradients of `_project`: at x, at the projection's weight and bias, at the short convolution's weight and bias
    where it is folded in (else none), and what `NormTape.gradients` returns for the norm."""
    if options.folded:
        folded = fold(*weights[:4], options.dtype)
        dx, dfolded, *dnorm = folded_linear_backward(dp, x, folded, norm, dresidual)
        gradients = list(fold_backward(dfolded, *weights[:3]))
        return dx, gradients[:2], gradients[2:], dnorm
    dx, dweight, dbias, *dnorm = linear_to_channels_backward(dp, x, weights.in_weight, weights.in_bias, norm, dresidual)
    return dx, [dweight, dbias], [], dnorm
