"""The causal long convolution, behind one contract: y = gate * (h (*) u + bias * u).

Shapes: u, gate, y [B, C, L] (batch, channels, tokens); h [C, L]; bias [C]. Half-precision inputs are computed in
float32 and y is returned in the dtype of u; float64 stays float64.
"""

import math
from functools import lru_cache

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import chunks
from hyena_dist.ops.precision import compute_dtype, without_autocast

METHODS = ("auto", "right_angle", "rfft")

# `auto` takes a method only on a kind of device on which it was measured and checked; elsewhere the plain reference.
_FASTEST = {"cpu": "right_angle"}


def causal_conv(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None, *, method: str = "auto") -> Tensor:
    """Causal convolution of every channel with its own filter, plus a direct term, times an optional gate.

        y[b, c, t] = gate[b, c, t] * (sum_{s <= t} h[c, t - s] u[b, c, s] + bias[c] u[b, c, t])

    `right_angle` saves its inputs only and works in channel chunks; `rfft` is the plain reference through autograd.

    Raises:
        ValueError: unknown method, or shapes that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    batch, channels, length = u.shape
    if h.shape != (channels, length) or bias.shape != (channels,) or (gate is not None and gate.shape != u.shape):
        got = [None if t is None else tuple(t.shape) for t in (h, bias, gate)]
        raise ValueError(f"u {tuple(u.shape)} needs h [{channels}, {length}], bias [{channels}] and a gate of its own "
                         f"shape, got {got}")
    if method == "auto":
        method = _FASTEST.get(u.device.type, "rfft")
    if method == "rfft":
        return causal_conv_reference(u, h, bias, gate)
    return _RightAngleConv.apply(u, h, bias, gate)


def causal_conv_reference(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None = None) -> Tensor:
    """The same function as `causal_conv`, by one real FFT padded to twice the length (HyenaDNA's `fftconv`)."""
    dtype = compute_dtype(u, h)
    with without_autocast(u):
        size = next_fast_len(2 * u.shape[-1], real=True)
        x = u.to(dtype)
        spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(h.to(dtype), n=size)
        y = torch.fft.irfft(spectrum, n=size)[..., : u.shape[-1]] + x * bias.to(dtype)[:, None]
        return (y if gate is None else y * gate.to(dtype)).to(u.dtype)


@lru_cache(maxsize=8)
def _twist(size: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """w^n for n < length, w = exp(i pi / (2 size)): [length], complex."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    return torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())


class _RightAngleConv(torch.autograd.Function):
    """The right-angle convolution: with w = exp(i pi / 2N) and any N >= L,

        y = Re( w^-n IFFT_N( FFT_N(w^n u) FFT_N(w^n h) ) )[:L]

    is the causal convolution: a product modulo x^N = i, so what wraps around lands in the imaginary part. One complex
    transform of N per real channel, no zero padding to 2L. Gradients are the same pipeline with conjugate spectra,
    recomputed from the saved inputs chunk by chunk; no spectrum outlives a chunk.
    """

    @staticmethod
    def forward(ctx, u: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, h, bias, gate)
        dtype = compute_dtype(u, h)
        batch, channels, length = u.shape
        transform = _Transform(length, dtype, u.device)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        with without_autocast(u):
            for part in chunks(channels, batch * transform.size):
                x = u[:, part].to(dtype)
                conv = transform.inverse(transform.forward(x).mul_(transform.forward(h[part].to(dtype))))
                if gate is None:
                    torch.addcmul(conv, x, bias[part, None].to(dtype), out=y[:, part])
                else:
                    torch.mul(conv.addcmul_(x, bias[part, None].to(dtype)), gate[:, part], out=y[:, part])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, h, bias, gate = ctx.saved_tensors
        dtype = compute_dtype(u, h)
        batch, channels, length = u.shape
        transform = _Transform(length, dtype, u.device)
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        dh, dbias = torch.empty_like(h), torch.empty_like(bias)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        with without_autocast(u):
            for part in chunks(channels, batch * transform.size):
                x, g, b = u[:, part].to(dtype), dy[:, part].to(dtype), bias[part, None].to(dtype)
                spectrum_u, spectrum_h = transform.forward(x), transform.forward(h[part].to(dtype))
                if gate is not None and dgate is not None:
                    torch.mul(transform.inverse(spectrum_u * spectrum_h).addcmul_(x, b), g, out=dgate[:, part])
                    g = g * gate[:, part]
                spectrum_g = transform.forward(g)
                dh[part] = transform.inverse(spectrum_u.conj_physical_().mul_(spectrum_g).sum(0))
                dbias[part] = (g * x).sum((0, 2))
                torch.addcmul(transform.inverse(spectrum_g.mul_(spectrum_h.conj_physical_())), g, b, out=du[:, part])
        return du, dh, dbias, dgate


class _Transform:
    """The twisted transform of one length and its inverse: [..., L] real <-> [..., N] complex."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = length
        self.size = next_fast_len(length)
        self.twist = _twist(self.size, length, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x * self.twist, n=self.size)

    def inverse(self, spectrum: Tensor) -> Tensor:
        y = torch.fft.ifft(spectrum)[..., : self.length]
        # Re(conj(w^n) y) in two real multiply-adds: no complex product whose imaginary half is thrown away.
        return (y.real * self.twist.real).addcmul_(y.imag, self.twist.imag)
