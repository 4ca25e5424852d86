"""One long convolution of a group of channels, of rows of any length, by cuFFT, with Triton's kernels around the
transforms: the right-angle convolution of `ops.long_conv`, in float32."""

import math
from functools import lru_cache

import torch
import triton
from scipy.fft import next_fast_len
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton.elementwise import enter, leave, leave_backward, multiply, real_part
from hyena_dist.ops.triton.given import Given, new, strides

BLOCK = 1024
WARPS = 4


class ByCufft:
    """`groups.Convolution` of rows of any length."""

    def __init__(self, given: Given) -> None:
        self.given, length = given, given.rows.size
        self.size = points(length)
        self.twist = _twist(self.size, length, given.p.device)
        self.launch = {"BLOCK": BLOCK, "num_warps": WARPS}
        self.kernel = {**given.constants(), **self.launch}

    def cost(self, out: Tensor, backward: bool) -> Cost:
        """A transform counts as one pass."""
        given = self.given
        filters = given.here * self.size
        rows, h = filters * given.rows.count, 4 * given.here * given.rows.size
        u, gate, written = given.moved(out, backward)
        flops = 5 * math.log2(max(2, self.size))
        if not backward:
            return Cost(2 * u + gate + written + 64 * rows + 32 * filters + h, flops * (2 * rows + filters), 7)
        read = 2 * u + 2 * gate + out.itemsize * given.here * given.rows.tokens
        return Cost(read + written + 128 * rows + 64 * filters + 2 * h, flops * (4 * rows + 2 * filters), 12)

    def forward(self, h: Tensor, direct: Tensor, y: Tensor) -> None:
        given = self.given
        u = self._entered(given.ungated())
        self._multiplied(u, self._entered(given.filters(h))[0])
        conv = torch.fft.ifft(u, norm="forward")
        leave[self._grid()](*given.arguments(), torch.view_as_real(conv), y, *strides(y), direct, self.twist, self.size,
                            1 / self.size, **self.kernel)

    def backward(self, dy: Tensor, h: Tensor, direct: Tensor, dq: Tensor, dx: Tensor, dh: Tensor) -> Tensor:
        given = self.given
        u, g = self._entered(given.ungated()), self._entered(given.gradient(dy), other=True)
        dspectrum = self._multiplied(u, self._entered(given.filters(h))[0], g)
        blocks, here, count = grid = self._grid()
        real_part[blocks, here](torch.view_as_real(torch.fft.fft(dspectrum)), self.twist, dh, given.rows.size,
                                dh.stride(0), self.size, 1 / self.size, **self.launch)
        conv, du = torch.fft.ifft(u, norm="forward"), torch.fft.fft(g)
        del u, g, dspectrum
        sums = new(dy, count, here, blocks)
        leave_backward[grid](*given.arguments(), torch.view_as_real(conv), torch.view_as_real(du), dy, *strides(dy), dq,
                             *dq.stride()[:3], dx, sums, direct, self.twist, self.size, 1 / self.size, **self.kernel)
        return sums

    def _entered(self, given: Given, *, other: bool = False) -> Tensor:
        """What `enter` makes of what is given, and its transform: [rows, c, N]."""
        count, here = given.rows.count, given.here
        z = new(given.p, count, here, self.size, dtype=torch.complex64)
        enter[(triton.cdiv(self.size, BLOCK), here, count)](
            *given.arguments(), self.twist, torch.view_as_real(z), self.size, OTHER=other,
            **self.kernel | given.constants())
        return torch.fft.ifft(z, norm="forward") if other else torch.fft.fft(z)

    def _multiplied(self, u: Tensor, h: Tensor, g: Tensor | None = None) -> Tensor:
        """Products of `multiply` in place of u and g; the gradient at h's spectrum, if there is g."""
        dh = torch.empty_like(h) if g is not None else h
        pairs = [torch.view_as_real(z) for z in (u, u if g is None else g, h, dh)]
        multiply[(triton.cdiv(self.size, BLOCK), len(h))](*pairs, self.size, len(u), BACKWARD=g is not None,
                                                          **self.launch)
        return dh

    def _grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.given.rows.size, BLOCK), self.given.here, self.given.rows.count

    def tables(self) -> tuple[Tensor, ...]:
        return (self.twist,)


def points(length: int) -> int:
    """Of a transform of rows of `length` tokens, of which every row is aligned."""
    return 16 * next_fast_len(-(-length // 16), real=True)


@lru_cache(maxsize=8)
def _twist(size: int, length: int, device: torch.device) -> Tensor:
    """[2, L]: real and imaginary parts of w^n, w = exp(i pi / (2 size))."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    return torch.stack([angle.cos(), angle.sin()]).float()
