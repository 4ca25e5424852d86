"""The operator of any length by cuFFT, with Triton's kernels around the transforms: the right-angle convolution of
`ops.long_conv`, in float32."""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
from scipy.fft import next_fast_len
from torch import Tensor

from hyena_dist.ops.triton.elementwise import enter, leave, leave_backward, multiply, real_part
from hyena_dist.ops.triton.groups import channel_groups
from hyena_dist.ops.triton.short import backward as short_backward

BLOCK = 1024
WARPS = 4
GROUP_ELEMENTS = 2**25
"""Elements of a group of channels: its spectra are 8 bytes each, and four of them live at once."""


class ByCufft:
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.p, self.weight, self.bias = p, weight, bias
        self.batch, _, self.channels, self.length = p.shape
        self.size = next_fast_len(self.length, real=True)
        self.twist = _twist(self.size, self.length, p.device)
        self.launch = {"BLOCK": BLOCK, "num_warps": WARPS}
        self.kernel = {"K": weight.shape[1], **self.launch}

    def mix(self, h: Tensor, direct: Tensor) -> Tensor:
        """Filters [C, L] and their bias [C] -> [B, C, L]."""
        p = self.p
        y = torch.empty(self.batch, self.channels, self.length, dtype=p.dtype, device=p.device)
        for part in self._groups():
            u = self._entered("u", part)
            self._multiplied(u, self._entered("h", part, h))
            conv = torch.fft.ifft(u, norm="forward")
            leave[self._grid(part)](torch.view_as_real(conv), p, y, self.weight, self.bias, direct, self.twist,
                                    self.length, self.size, self.channels, part.start, 1 / self.size, **self.kernel)
        return y

    def mix_backward(self, dy: Tensor, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at the short convolution's weight and bias, h and direct; that at p takes p's place, and mix's
        result takes dy's."""
        p, weight, bias = self.p, self.weight, self.bias
        dweight = torch.empty(3, self.channels, weight.shape[1], dtype=weight.dtype, device=p.device)
        dbias = torch.empty(3, self.channels, dtype=bias.dtype, device=p.device)
        dh, ddirect = torch.empty_like(h), torch.empty_like(direct)
        for part in self._groups():
            u, g = self._entered("u", part), self._entered("g", part, dy)
            dspectrum = self._multiplied(u, self._entered("h", part, h), g)
            blocks, here, _ = grid = self._grid(part)
            real_part[blocks, here](torch.view_as_real(torch.fft.fft(dspectrum)), self.twist, dh, self.length,
                                    self.size, part.start, 1 / self.size, **self.launch)
            conv, du = torch.fft.ifft(u, norm="forward"), torch.fft.fft(g)
            del u, g, dspectrum
            dq = torch.empty(self.batch, 3, here, self.length, dtype=p.dtype, device=p.device)
            sums = torch.empty(self.batch, here, blocks, dtype=torch.float32, device=p.device)
            leave_backward[grid](torch.view_as_real(conv), torch.view_as_real(du), p, dy, dq, sums, weight, bias,
                                 direct, self.twist, self.length, self.size, self.channels, part.start, 1 / self.size,
                                 **self.kernel)
            del conv, du
            ddirect[part] = sums.sum((0, 2))
            dweight[:, part], dbias[:, part] = short_backward(dq, p, weight, part)
        return dweight.flatten(0, 1), dbias.flatten(), dh, ddirect

    def _entered(self, what: str, part: slice, x: Tensor | None = None) -> Tensor:
        """A row of `enter` and its transform: [B, c, N], of the filters [c, N]."""
        rows = 1 if what == "h" else self.batch
        here = part.stop - part.start
        z = torch.empty(rows, here, self.size, dtype=torch.complex64, device=self.p.device)
        source, dy = (x, x) if what == "h" else (self.p, x)
        enter[(triton.cdiv(self.size, BLOCK), here, rows)](
            source, dy, self.weight, self.bias, self.twist, torch.view_as_real(z), self.length, self.size,
            self.channels, part.start, WHAT=what, **self.kernel)
        if what == "h":
            z = z[0]
        return torch.fft.ifft(z, norm="forward") if what == "g" else torch.fft.fft(z)

    def _multiplied(self, u: Tensor, h: Tensor, g: Tensor | None = None) -> Tensor:
        """Products of `multiply` in place of u and g; the gradient at h's spectrum, if there is g."""
        dh = torch.empty_like(h) if g is not None else h
        pairs = [torch.view_as_real(z) for z in (u, u if g is None else g, h, dh)]
        multiply[(triton.cdiv(self.size, BLOCK), len(h))](*pairs, self.size, self.batch, BACKWARD=g is not None,
                                                          **self.launch)
        return dh

    def _grid(self, part: slice) -> tuple[int, int, int]:
        return triton.cdiv(self.length, BLOCK), part.stop - part.start, self.batch

    def _groups(self) -> Iterator[slice]:
        return channel_groups(self.channels, self.batch * self.size, GROUP_ELEMENTS)


@lru_cache(maxsize=8)
def _twist(size: int, length: int, device: torch.device) -> Tensor:
    """[2, L]: real and imaginary parts of w^n, w = exp(i pi / (2 size))."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    return torch.stack([angle.cos(), angle.sin()]).float()
