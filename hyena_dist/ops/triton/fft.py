"""The operator of any length by cuFFT, with Triton's kernels around the transforms: the right-angle convolution of
`ops.long_conv`, in float32."""

import math
from functools import lru_cache

import torch
import triton
from scipy.fft import next_fast_len
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton.elementwise import enter, leave, leave_backward, multiply, real_part
from hyena_dist.ops.triton.groups import SHORT_BYTES, SHORT_LAUNCHES, ByGroups

BLOCK = 1024
WARPS = 4
GROUP_ELEMENTS = 2**25
"""Elements of a group of channels: its spectra are 8 bytes each, and four of them live at once."""


class ByCufft(ByGroups):
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.size = 16 * next_fast_len(-(-p.shape[-1] // 16), real=True)  # of which every row is aligned
        super().__init__(p, weight, bias, self.size, GROUP_ELEMENTS)
        self.twist = _twist(self.size, self.length, p.device)
        self.launch = {"BLOCK": BLOCK, "num_warps": WARPS}
        self.kernel = {"K": self.kernel_size, **self.launch}

    def cost(self, backward: bool) -> Cost:
        """A transform counts as one pass."""
        a, elements, points, filters = self.sizes
        h, flops = 4 * self.channels * self.length, 5 * math.log2(max(2, self.size))
        if not backward:
            return Cost(6 * a * elements + 64 * points + 32 * filters + h, flops * (2 * points + filters),
                        7 * self.groups)
        return Cost((12 + SHORT_BYTES) * a * elements + 128 * points + 64 * filters + 2 * h,
                    flops * (4 * points + 2 * filters), (12 + SHORT_LAUNCHES) * self.groups + 2)

    def _forward(self, part: slice, h: Tensor, direct: Tensor, y: Tensor) -> None:
        u = self._entered("u", part)
        self._multiplied(u, self._entered("h", part, h))
        conv = torch.fft.ifft(u, norm="forward")
        leave[self._grid(part)](torch.view_as_real(conv), self.p, y, self.weight, self.bias, direct, self.twist,
                                self.length, self.size, self.channels, part.start, 1 / self.size, **self.kernel)

    def _backward(self, part: slice, dy: Tensor, h: Tensor, direct: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        u, g = self._entered("u", part), self._entered("g", part, dy)
        dspectrum = self._multiplied(u, self._entered("h", part, h), g)
        blocks, here, _ = grid = self._grid(part)
        real_part[blocks, here](torch.view_as_real(torch.fft.fft(dspectrum)), self.twist, dh, self.length, self.size,
                                part.start, 1 / self.size, **self.launch)
        conv, du = torch.fft.ifft(u, norm="forward"), torch.fft.fft(g)
        del u, g, dspectrum
        dq = self.new(self.batch, 3, here, self.length, dtype=self.p.dtype)
        sums = self.new(self.batch, here, blocks)
        leave_backward[grid](torch.view_as_real(conv), torch.view_as_real(du), self.p, dy, dq, sums, self.weight,
                             self.bias, direct, self.twist, self.length, self.size, self.channels, part.start,
                             1 / self.size, **self.kernel)
        return dq, sums

    def _entered(self, what: str, part: slice, x: Tensor | None = None) -> Tensor:
        """A row of `enter` and its transform: [B, c, N], of the filters [c, N]."""
        rows = 1 if what == "h" else self.batch
        here = part.stop - part.start
        z = self.new(rows, here, self.size, dtype=torch.complex64)
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


@lru_cache(maxsize=8)
def _twist(size: int, length: int, device: torch.device) -> Tensor:
    """[2, L]: real and imaginary parts of w^n, w = exp(i pi / (2 size))."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    return torch.stack([angle.cos(), angle.sin()]).float()
