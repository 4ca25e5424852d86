"""The backend of torch's operations: `mix` and its gradients in chunks of channels, whose temporaries stay in cache.

In the backward pass the buffers of a chunk hold one thing after the other. The convolutions are numbered o = 0 to
N - 2; the gate x_{N-1} multiplies the input of the first, and x_{N-2-o} the result of convolution o.

    buffer                 before            during                                         after
    p                      projection        projection                                     gradient at p
    dy                     gradient at u     copied to grad, then u is written here         u
    dshort, block of v     (uninitialised)   input of convolution 0, then its product with  gradient at v
                                             the gradient there, which is summed for dbias
    dshort, block of       (uninitialised)   (uninitialised)                                gradient at x_{N-1}
      x_{N-1}
    dshort, block of       (uninitialised)   result of convolution o                        gradient at x_{N-2-o}
      x_{N-2-o}
    grad                   gradient at u     gradient at the result, then at the input of   gradient at the input of
                                             each convolution, from the last to the first   convolution 0
    u o                    (uninitialised)   input of convolution o + 1, then its product   (scratch)
                                             with the gradient there, summed for dbias
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hyena_dist.ops.chunking import channel_chunks
from hyena_dist.ops.long_conv import Transform, correlate, resolve, transform
from hyena_dist.ops.mix import Asked, MixWeights, Segments, spans
from hyena_dist.ops.precision import compute_dtype
from hyena_dist.ops.short_conv import ShortConvTape
from hyena_dist.ops.workspace import Workspace

ALL = slice(None)


class Chunked:
    """The backend (`ops.mix.Backend`). Segments are transformed apart, one after the other.

    Args:
        method: of the long convolutions (`ops.long_conv`).
    """

    def __init__(self, method: str = "auto") -> None:
        self._method = method

    def refusal(self, _asked: Asked) -> str | None:
        """None: it computes everything."""
        return None

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments) -> tuple[Tensor, list[Tensor]]:
        batch, channels = len(p), weights.filters.shape[1]
        y = torch.empty(batch, channels, p.shape[2], dtype=p.dtype, device=p.device)
        for segment in self._segments(p, weights, segments):
            segment.forward(y[..., segment.tokens])
        return y, []

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments,
                     _kept: list[Tensor]) -> MixWeights:
        gradients: MixWeights | None = None
        for segment in self._segments(p, weights, segments):
            found = segment.backward(dy[..., segment.tokens])
            gradients = found if gradients is None else _add(gradients, found)
        assert gradients is not None
        return gradients

    def _segments(self, p: Tensor, weights: MixWeights, segments: Segments) -> "Iterator[_Segment]":
        work = Workspace(compute_dtype(p, weights.filters), p.device)
        for tokens in spans(segments, p.shape[2]):
            yield _Segment(p, weights, tokens, resolve(self._method, p.device), work,
                           whole=tokens.stop - tokens.start == weights.filters.shape[-1])


class _Segment:
    """One segment of the tokens of p [B, (N + 1) C, l]."""

    def __init__(self, p: Tensor, weights: MixWeights, tokens: slice, method: str, work: Workspace, *,
                 whole: bool) -> None:
        self.tokens = tokens
        length, dtype = tokens.stop - tokens.start, compute_dtype(p, weights.filters)
        self._orders, self._channels, self._lags = weights.filters.shape
        self._p = p[..., tokens].unflatten(1, (-1, self._channels))
        self._filters = weights.filters if whole else weights.filters[..., :length]
        self._bias, self._dtype, self._work = weights.bias, dtype, work
        self._short = _ShortConv(weights, work, dtype)
        self._fft: Transform = transform(method, length, dtype, p.device)

    def forward(self, y: Tensor) -> None:
        """Writes u to y [B, C, n]."""
        dtype, work, fft = self._dtype, self._work, self._fft
        for part in self._parts():
            *gates, v = self._short.forward(self._p[:, :, part], part)
            u = torch.mul(v.to(dtype), gates.pop(), out=work("u", *v.shape))
            for h, b in zip(self._filters[:, part], self._bias[:, part, None].to(dtype), strict=True):
                conv = fft.inverse(fft.forward(u).mul_(fft.forward(h.to(dtype))))
                conv, gate = torch.addcmul(conv, u, b, out=u), gates.pop()
                torch.mul(conv, gate, out=conv if gates else y[:, part])

    def backward(self, dy: Tensor) -> MixWeights:
        """The gradients at the weights; the filters' have as many lags as the filters, and are 0 at lags that no token
        reaches. The file's docstring says which buffer holds what, and when."""
        orders, dtype, work, fft = self._orders, self._dtype, self._work, self._fft
        lags = self._filters.shape[-1]
        make = torch.empty if lags == self._lags else torch.zeros
        dwhole = make(orders, self._channels, self._lags, dtype=self._filters.dtype, device=dy.device)
        dfilters, dbias = dwhole[..., :lags], torch.empty_like(self._bias)
        for part in self._parts():
            x = self._p[:, :, part]
            *gates, v = self._short.forward(x, part)
            dshort = work("dshort", *x.shape)
            *dgates, dv = dshort.unbind(1)
            u, b = torch.mul(gates[-1].to(dtype), v, out=dv), self._bias[:, part, None].to(dtype)
            steps, grad = [], work("grad", *v.shape).copy_(dy[:, part])
            for o in range(orders):
                gate = orders - 1 - o
                spectra = fft.forward(u), fft.forward(self._filters[o, part].to(dtype))
                conv = torch.addcmul(fft.inverse(spectra[0] * spectra[1]), u, b[o], out=dgates[gate])
                steps.append((u, spectra, conv))
                u = torch.mul(conv, gates[gate], out=work(f"u {o}", *v.shape) if gate else dy[:, part])
            for o in reversed(range(orders)):
                step_input, spectra, conv = steps.pop()
                gate = orders - 1 - o
                conv.mul_(grad)
                grad = grad.mul_(gates[gate])
                dstep = correlate(fft, grad, *spectra, dfilters[o, part])
                dbias[o, part] = step_input.mul_(grad).sum((0, 2))
                torch.addcmul(dstep, grad, b[o], out=grad)
            torch.mul(v, grad, out=dgates[-1])
            torch.mul(gates[-1], grad, out=dv)
            self._short.backward(dshort, x, part)
        return MixWeights(*self._short.gradients(), dwhole, dbias)

    def _parts(self) -> Iterator[slice]:
        return channel_chunks(self._channels, len(self._p), self._p.shape[-1], self._p.device)


class _ShortConv:
    """The short convolution of chunks of channels, x [B, N + 1, c, n], or nothing where p has been through it."""

    def __init__(self, weights: MixWeights, work: Workspace, dtype: torch.dtype) -> None:
        self._dtype, self._tape = dtype, None
        if weights.short_weight is not None and weights.short_bias is not None:
            blocks = len(weights.filters) + 2, weights.filters.shape[1]
            self._tape = ShortConvTape(weights.short_weight.unflatten(0, blocks),
                                       weights.short_bias.unflatten(0, blocks), dtype, work)

    def forward(self, x: Tensor, part: slice) -> tuple[Tensor, ...]:
        """x0, x1, ..., v, each [B, c, n]."""
        return (x if self._tape is None else self._tape.forward(x.to(self._dtype), (ALL, part))).unbind(1)

    def backward(self, dy: Tensor, x: Tensor, part: slice) -> None:
        """Writes the gradient at x over it."""
        if self._tape is None:
            x.copy_(dy)
        else:
            self._tape.backward(dy, x.to(self._dtype), (ALL, part), x)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Those at the weight and the bias."""
        if self._tape is None:
            return None, None
        return self._tape.dweight.flatten(0, 1), self._tape.dbias.flatten()


def _add(total: MixWeights, part: MixWeights) -> MixWeights:
    for a, b in zip(total, part, strict=True):
        if a is not None and b is not None:
            a.add_(b)
    return total
