"""The causal long convolution, behind one contract: y = gate * (h (*) u + bias * u).

Shapes: u, gate, y [B, C, L] (batch, channels, tokens); h [C, L]; bias [C]. Half-precision inputs are computed in
float32 and y is returned in the dtype of u; float64 stays float64.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Protocol

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import chunks
from hyena_dist.ops.precision import compute_dtype, without_autocast
from hyena_dist.ops.segments import Group, Segments

METHODS = ("auto", "right_angle", "rfft")

# `auto` takes a method only on a kind of device on which it was measured and checked; elsewhere the plain one.
# Forward and backward on an H100, 256 channels x 1M tokens, against rfft: 1.08 times as fast at 1K, 1.33 at 1M.
_FASTEST = {"cpu": "right_angle", "cuda": "right_angle", "meta": "right_angle"}


def causal_conv(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None, *, method: str = "auto") -> Tensor:
    """Causal convolution of every channel with its own filter, plus a direct term, times an optional gate.

        y[b, c, t] = gate[b, c, t] * (sum_{s <= t} h[c, t - s] u[b, c, s] + bias[c] u[b, c, t])

    Saves its inputs only and works in channel chunks: spectra are recomputed, and none outlives a chunk.

    Raises:
        ValueError: unknown method, or shapes that do not fit.
    """
    batch, channels, length = u.shape
    if h.shape != (channels, length) or bias.shape != (channels,) or (gate is not None and gate.shape != u.shape):
        got = [None if t is None else tuple(t.shape) for t in (h, bias, gate)]
        raise ValueError(f"u {tuple(u.shape)} needs h [{channels}, {length}], bias [{channels}] and a gate of its own "
                         f"shape, got {got}")
    return _CausalConv.apply(u, h, bias, gate, resolve(method, u.device))


def causal_conv_reference(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None) -> Tensor:
    """The same function as `causal_conv`, by one real FFT padded to twice the length (HyenaDNA's `fftconv`)."""
    dtype = compute_dtype(u, h)
    with without_autocast(u):
        size = next_fast_len(2 * u.shape[-1], real=True)
        x = u.to(dtype)
        spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(h.to(dtype), n=size)
        y = torch.fft.irfft(spectrum, n=size)[..., : u.shape[-1]] + x * bias.to(dtype)[:, None]
        return (y if gate is None else y * gate.to(dtype)).to(u.dtype)


def resolve(method: str, device: torch.device) -> str:
    """The method that `method` means on a device.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return _FASTEST.get("cuda" if device.type == "meta" else device.type, "rfft") if method == "auto" else method


class Transform(Protocol):
    """Of one length, [..., L] real <-> [..., F] complex, in which the causal convolution is a product:

        h (*) u = inverse(forward(h) * forward(u))
        the gradient at u of <g, h (*) u> is inverse_adjoint(forward(h) * adjoint(g)), and at h likewise with u

    The inverses may overwrite their argument, and what they return may be strided: read it once.
    """

    def forward(self, x: Tensor) -> Tensor: ...
    def inverse(self, spectrum: Tensor) -> Tensor: ...
    def adjoint(self, g: Tensor) -> Tensor: ...
    def inverse_adjoint(self, spectrum: Tensor) -> Tensor: ...


def transform(method: str, length: int, dtype: torch.dtype, device: torch.device) -> Transform:
    """The transform of a method (`resolve`), of tensors of a real dtype."""
    return RightAngle(length, dtype, device) if method == "right_angle" else PaddedReal(length)


class PaddedReal:
    """The plain method: real FFTs of a fast length of at least 2 L."""

    def __init__(self, length: int) -> None:
        self._length, self._size = length, next_fast_len(2 * length, real=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=self._size)

    def inverse(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum, n=self._size)[..., : self._length]

    def adjoint(self, g: Tensor) -> Tensor:
        return self.forward(g).conj_physical_()

    def inverse_adjoint(self, spectrum: Tensor) -> Tensor:
        return self.inverse(spectrum.conj_physical_())


class RightAngle:
    """With w = exp(i pi / 2N) and any N >= L,

        y = Re( w^-n IFFT_N( FFT_N(w^n u) FFT_N(w^n h) ) )[:L]

    is the causal convolution: a product modulo x^N = i, so what wraps around lands in the imaginary part. One complex
    transform of N per real channel, no zero padding to 2L. All four matrices in it are symmetric, so that the adjoint
    is the same pipeline from the other end, Re(w^n FFT_N(H IFFT_N(w^-n g))): no spectrum is conjugated. The inverse's
    1 / N is in its twist, because cuFFT takes another pass for it.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._length, self._size = length, next_fast_len(length)
        self._twist, self._untwist = _twists(self._size, length, dtype, device)
        self._scratch = torch.empty(0, dtype=dtype.to_complex(), device=device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self._times(x, self._twist), n=self._size)

    def inverse(self, spectrum: Tensor) -> Tensor:
        return torch.fft.ifft(spectrum, norm="forward")[..., : self._length].mul_(self._untwist).real

    def adjoint(self, g: Tensor) -> Tensor:
        return torch.fft.ifft(self._times(g, self._untwist), n=self._size, norm="forward")

    def inverse_adjoint(self, spectrum: Tensor) -> Tensor:
        return torch.fft.fft(spectrum)[..., : self._length].mul_(self._twist).real

    def _times(self, x: Tensor, twist: Tensor) -> Tensor:
        # Into memory that is used again: fresh pages would cost more than the product.
        if self._scratch.numel() < x.numel():
            self._scratch = self._scratch.new_empty(x.numel())
        return torch.mul(x, twist, out=self._scratch[: x.numel()].view(x.shape))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def _twists(size: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """w^n and w^-n / size for n < length, w = exp(i pi / (2 size)): each [length], complex."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    twist = torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())
    return twist, twist.conj().resolve_conj() / size


Spectra = list[tuple[Tensor, Tensor]]
"""Of u and of h, of every transform of a `Convolution`."""


class Convolution(Protocol):
    """h (*) u of chunks of channels, and its gradients: u [B, c, L], h [c, at least as many lags as are needed].

    What comes back may be strided: read it once.
    """

    lags: int
    """How many lags it needs of h."""

    def convolve(self, u: Tensor, h: Tensor) -> Tensor:
        """h (*) u"""

    def spectra(self, u: Tensor, h: Tensor) -> Spectra:
        """What the two functions below work with."""

    def product(self, spectra: Spectra) -> Tensor:
        """h (*) u, which leaves the spectra as they are."""

    def correlate(self, g: Tensor, spectra: Spectra, dh: Tensor) -> Tensor:
        """From the gradient g at the result that at u; that at h is written to dh [c, lags]. The spectra are
        overwritten."""


def convolution(method: str, length: int, segments: Segments | None, dtype: torch.dtype,
                device: torch.device) -> Convolution:
    """The convolution of rows of `length` tokens by a method (`resolve`), which no segment's border lets through."""
    if segments is None:
        return _Whole(transform(method, length, dtype, device), length)
    return _Apart(segments, method, dtype, device)


class _Whole:
    """Rows as one sequence each, by one transform."""

    def __init__(self, fft: Transform, length: int) -> None:
        self._fft, self.lags = fft, length

    def convolve(self, u: Tensor, h: Tensor) -> Tensor:
        return self._fft.inverse(self._fft.forward(u).mul_(self._fft.forward(h[:, : self.lags])))

    def spectra(self, u: Tensor, h: Tensor) -> Spectra:
        return [(self._fft.forward(u), self._fft.forward(h[:, : self.lags]))]

    def product(self, spectra: Spectra) -> Tensor:
        return self._fft.inverse(spectra[0][0] * spectra[0][1])

    def correlate(self, g: Tensor, spectra: Spectra, dh: Tensor) -> Tensor:
        return correlate(self._fft, g, *spectra[0], dh)


class _Apart:
    """Segments as sequences of their own, by one transform of every group of like size (`ops.segments.Group`).

    Places of padding hold a token of the same segment. It stands behind the segment, where it changes no result that is
    used; only the gradient at the result has to be 0 there.
    """

    def __init__(self, segments: Segments, method: str, dtype: torch.dtype, device: torch.device) -> None:
        self.lags, self._batch = segments.longest, segments.batch
        self._groups, self._places = segments.groups(device), segments.places(device)
        self._ffts = [transform(method, group.size, dtype, device) for group in self._groups]

    def convolve(self, u: Tensor, h: Tensor) -> Tensor:
        return self._back(fft.inverse(fft.forward(x).mul_(fft.forward(h[:, : group.size])))
                          for group, fft, x in self._apart(u))

    def spectra(self, u: Tensor, h: Tensor) -> Spectra:
        return [(fft.forward(x), fft.forward(h[:, : group.size])) for group, fft, x in self._apart(u)]

    def product(self, spectra: Spectra) -> Tensor:
        return self._back(fft.inverse(of_u * of_h) for fft, (of_u, of_h) in zip(self._ffts, spectra, strict=True))

    def correlate(self, g: Tensor, spectra: Spectra, dh: Tensor) -> Tensor:
        dh.zero_()

        def found() -> Iterator[Tensor]:
            for (group, fft, x), of_both in zip(self._apart(g), spectra, strict=True):
                of_group = torch.empty(dh.shape[0], group.size, dtype=g.dtype, device=g.device)
                yield correlate(fft, x.masked_fill(group.padding[:, None], 0), *of_both, of_group)
                dh[:, : group.size] += of_group

        return self._back(found())

    def _apart(self, x: Tensor) -> Iterator[tuple[Group, Transform, Tensor]]:
        """[B, c, L] -> each group and its segments, [G, c, size]."""
        rows = x.transpose(0, 1).flatten(1)
        for group, fft in zip(self._groups, self._ffts, strict=True):
            chosen = rows.index_select(1, group.tokens.flatten())
            yield group, fft, chosen.unflatten(1, group.tokens.shape).transpose(0, 1)

    def _back(self, parts: Iterable[Tensor]) -> Tensor:
        """[G, c, size] of every group -> [B, c, L]."""
        rows = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        return rows.index_select(1, self._places).unflatten(1, (self._batch, -1)).transpose(0, 1)


def convolve(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None, method: str = "auto", *,
             out: Tensor | None = None, segments: Segments | None = None) -> Tensor:
    """`causal_conv`, outside autograd; `out` [B, C, L] is where the result is written. With segments h may have fewer
    lags: as many as the longest has tokens."""
    dtype = compute_dtype(u, h)
    batch, channels, length = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device) if out is None else out
    with without_autocast(u):
        conv_of = convolution(resolve(method, u.device), length, segments, dtype, u.device)
        for part in chunks(channels, batch * length, u.device):
            x = u[:, part].to(dtype)
            conv = conv_of.convolve(x, h[part].to(dtype))
            conv = torch.addcmul(conv, x, bias[part, None].to(dtype))
            y[:, part] = conv if gate is None else conv.mul_(gate[:, part])
    return y


def convolve_backward(dy: Tensor, u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None, method: str = "auto",
                      *, over: bool = False, segments: Segments | None = None,
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `convolve` at u, h, bias and gate from that at its result. With `over`, those at u and at the gate
    are written over them."""
    dtype = compute_dtype(u, h)
    batch, channels, length = u.shape
    du = u if over else torch.empty(u.shape, dtype=u.dtype, device=u.device)
    dh, dbias = torch.zeros_like(h) if segments else torch.empty_like(h), torch.empty_like(bias)
    dgate = gate if gate is None or over else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with without_autocast(u):
        conv_of = convolution(resolve(method, u.device), length, segments, dtype, u.device)
        for part in chunks(channels, batch * length, u.device):
            x, g, b = u[:, part].to(dtype), dy[:, part].to(dtype), bias[part, None].to(dtype)
            spectra = conv_of.spectra(x, h[part].to(dtype))
            if gate is not None and dgate is not None:
                conv = torch.addcmul(conv_of.product(spectra), x, b).mul_(g)
                g = g * gate[:, part]
                dgate[:, part] = conv
            dx = conv_of.correlate(g, spectra, dh[part, : conv_of.lags])
            dbias[part] = (g * x).sum((0, 2))
            du[:, part] = torch.addcmul(dx, g, b)
    return du, dh, dbias, dgate


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None, method: str) -> Tensor:
        ctx.save_for_backward(u, h, bias, gate)
        ctx.method = method
        return convolve(u, h, bias, gate, method)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, h, bias, gate = ctx.saved_tensors
        return *convolve_backward(dy, u, h, bias, gate, ctx.method), None


def correlate(fft: Transform, g: Tensor, spectrum_u: Tensor, spectrum_h: Tensor, dh: Tensor) -> Tensor:
    """Gradients of h (*) u from that at the result, g [B, c, L], and from the spectra of u and h: that at h, summed
    over the batch, is written to dh [c, L], that at u is returned. It may be strided: read it once. The spectrum of u
    is overwritten."""
    spectrum = fft.adjoint(g)
    product = spectrum_u.mul_(spectrum)
    dh.copy_(fft.inverse_adjoint(product[0] if len(product) == 1 else product.sum(0)))
    return fft.inverse_adjoint(spectrum.mul_(spectrum_h))
