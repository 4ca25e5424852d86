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

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hyena_dist.ops.chunking import channel_chunks
from hyena_dist.ops.long_conv import Convolution, convolution, resolve
from hyena_dist.ops.mix import Asked, MixWeights
from hyena_dist.ops.precision import compute_dtype
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.short_conv import ShortConvTape
from hyena_dist.ops.workspace import Workspace

ALL = slice(None)


class Chunked:
    """The backend (`ops.mix.Backend`).

    Args:
        method: of the long convolutions (`ops.long_conv`).
    """

    keeps_spectra = False

    def __init__(self, method: str = "auto") -> None:
        self._method = method

    def refusal(self, _asked: Asked) -> str | None:
        """None: it computes everything."""
        return None

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
        y = torch.empty(len(p), weights.filters.shape[1], p.shape[2], dtype=p.dtype, device=p.device)
        _Pass(p, weights, segments, self.convolution).forward(y)
        return y, []

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                     _kept: list[Tensor]) -> MixWeights:
        return _Pass(p, weights, segments, self.convolution).backward(dy)

    def convolution(self, length: int, segments: Segments | None, dtype: torch.dtype,
                    device: torch.device) -> Convolution:
        """The long convolution of rows of `length` tokens, computed in `dtype`."""
        return convolution(resolve(self._method, device), length, segments, dtype, device)


class _Pass:
    """One pass over p [B, (N + 1) C, l]."""

    def __init__(self, p: Tensor, weights: MixWeights, segments: Segments | None,
                 make: Callable[[int, Segments | None, torch.dtype, torch.device], Convolution]) -> None:
        self._channels, self._dtype = weights.filters.shape[1], compute_dtype(p, weights.filters)
        self._p = p.unflatten(1, (-1, self._channels))
        self._filters, self._bias = weights.filters, weights.bias
        self._work = Workspace(self._dtype, p.device)
        self._short = _ShortConv(weights, self._work, self._dtype,
                                 None if segments is None else segments.positions(p.device))
        self._long = make(p.shape[2], segments, self._dtype, p.device)

    def forward(self, y: Tensor) -> None:
        """Writes u to y [B, C, l]."""
        dtype, work = self._dtype, self._work
        for part in self._parts():
            *gates, v = self._short.forward(self._p[:, :, part], part)
            u = torch.mul(v.to(dtype), gates.pop(), out=work("u", *v.shape))
            for h, b in zip(self._filters[:, part], self._bias[:, part, None].to(dtype), strict=True):
                conv, gate = torch.addcmul(self._long.convolve(u, h.to(dtype)), u, b, out=u), gates.pop()
                torch.mul(conv, gate, out=conv if gates else y[:, part])

    def backward(self, dy: Tensor) -> MixWeights:
        """The gradients at the weights; the filters' have as many lags as the filters, and are 0 at lags that no token
        reaches. The file's docstring says which buffer holds what, and when."""
        orders, dtype, work, long = len(self._filters), self._dtype, self._work, self._long
        make = torch.empty_like if long.lags == self._filters.shape[-1] else torch.zeros_like
        dfilters, dbias = make(self._filters), torch.empty_like(self._bias)
        for part in self._parts():
            x = self._p[:, :, part]
            *gates, v = self._short.forward(x, part)
            dshort = work("dshort", *x.shape)
            *dgates, dv = dshort.unbind(1)
            u, b = torch.mul(gates[-1].to(dtype), v, out=dv), self._bias[:, part, None].to(dtype)
            steps, grad = [], work("grad", *v.shape).copy_(dy[:, part])
            for o in range(orders):
                gate = orders - 1 - o
                spectra = long.spectra(u, self._filters[o, part].to(dtype))
                conv = torch.addcmul(long.product(spectra), u, b[o], out=dgates[gate])
                steps.append((u, spectra, conv))
                u = torch.mul(conv, gates[gate], out=work(f"u {o}", *v.shape) if gate else dy[:, part])
            for o in reversed(range(orders)):
                step_input, spectra, conv = steps.pop()
                gate = orders - 1 - o
                conv.mul_(grad)
                grad = grad.mul_(gates[gate])
                dstep = long.correlate(grad, spectra, dfilters[o, part, : long.lags])
                dbias[o, part] = step_input.mul_(grad).sum((0, 2))
                torch.addcmul(dstep, grad, b[o], out=grad)
            torch.mul(v, grad, out=dgates[-1])
            torch.mul(gates[-1], grad, out=dv)
            self._short.backward(dshort, x, part)
        return MixWeights(*self._short.gradients(), dfilters, dbias)

    def _parts(self) -> Iterator[slice]:
        return channel_chunks(self._channels, len(self._p), self._p.shape[-1], self._p.device)


class _ShortConv:
    """The short convolution of chunks of channels, x [B, N + 1, c, n], or nothing where p has been through it."""

    def __init__(self, weights: MixWeights, work: Workspace, dtype: torch.dtype, positions: Tensor | None) -> None:
        self._dtype, self._tape = dtype, None
        if weights.short_weight is not None and weights.short_bias is not None:
            blocks = len(weights.filters) + 2, weights.filters.shape[1]
            self._tape = ShortConvTape(weights.short_weight.unflatten(0, blocks),
                                       weights.short_bias.unflatten(0, blocks), dtype, work, positions)

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

