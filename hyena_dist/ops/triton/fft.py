"""The operator of any length by cuFFT, with Triton's kernels around the transforms: the right-angle convolution of
`ops.long_conv`, in float32."""

import math
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


class _Pipeline:
    """The kernels on the groups of channels of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.p, self.weight, self.bias = p, weight, bias
        self.batch, _, self.channels, self.length = p.shape
        self.size = next_fast_len(self.length, real=True)
        self.twist = _twist(self.size, self.length, p.device)
        self.launch = {"BLOCK": BLOCK, "num_warps": WARPS}
        self.kernel = {"K": weight.shape[1], **self.launch}

    def entered(self, what: str, part: slice, x: Tensor | None = None) -> Tensor:
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

    def multiplied(self, u: Tensor, h: Tensor, g: Tensor | None = None) -> Tensor:
        """Products of `multiply` in place of u and g; the gradient at h's spectrum, if there is g."""
        dh = torch.empty_like(h) if g is not None else h
        pairs = [torch.view_as_real(z) for z in (u, u if g is None else g, h, dh)]
        multiply[(triton.cdiv(self.size, BLOCK), len(h))](*pairs, self.size, self.batch, BACKWARD=g is not None,
                                                          **self.launch)
        return dh

    def grid(self, part: slice) -> tuple[int, int, int]:
        return triton.cdiv(self.length, BLOCK), part.stop - part.start, self.batch


def mix(p: Tensor, weight: Tensor, bias: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    """p [B, 3, C, L], short convolution's weight [3 C, K] and bias [3 C], filters [C, L] and their bias [C] ->
    [B, C, L]."""
    run = _Pipeline(p, weight, bias)
    y = torch.empty(run.batch, run.channels, run.length, dtype=p.dtype, device=p.device)
    for part in channel_groups(run.channels, run.batch * run.size, GROUP_ELEMENTS):
        u = run.entered("u", part)
        run.multiplied(u, run.entered("h", part, h))
        conv = torch.fft.ifft(u, norm="forward")
        leave[run.grid(part)](torch.view_as_real(conv), p, y, weight, bias, direct, run.twist, run.length, run.size,
                              run.channels, part.start, 1 / run.size, **run.kernel)
    return y


def mix_backward(p: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, h: Tensor,
                 direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at weight, bias, h and direct; that at p takes p's place, and mix(p) takes dy's."""
    run = _Pipeline(p, weight, bias)
    dweight = torch.empty(3, run.channels, weight.shape[1], dtype=weight.dtype, device=p.device)
    dbias = torch.empty(3, run.channels, dtype=bias.dtype, device=p.device)
    dh, ddirect = torch.empty_like(h), torch.empty_like(direct)
    for part in channel_groups(run.channels, run.batch * run.size, GROUP_ELEMENTS):
        u, g = run.entered("u", part), run.entered("g", part, dy)
        dspectrum = run.multiplied(u, run.entered("h", part, h), g)
        blocks, here, _ = grid = run.grid(part)
        real_part[blocks, here](torch.view_as_real(torch.fft.fft(dspectrum)), run.twist, dh, run.length, run.size,
                                part.start, 1 / run.size, **run.launch)
        conv, du = torch.fft.ifft(u, norm="forward"), torch.fft.fft(g)
        del u, g, dspectrum
        dq = torch.empty(run.batch, 3, here, run.length, dtype=p.dtype, device=p.device)
        sums = torch.empty(run.batch, here, blocks, dtype=torch.float32, device=p.device)
        leave_backward[grid](torch.view_as_real(conv), torch.view_as_real(du), p, dy, dq, sums, weight, bias, direct,
                             run.twist, run.length, run.size, run.channels, part.start, 1 / run.size, **run.kernel)
        del conv, du
        ddirect[part] = sums.sum((0, 2))
        dweight[:, part], dbias[:, part] = short_backward(dq, p, weight, part)
    return dweight.flatten(0, 1), dbias.flatten(), dh, ddirect


@lru_cache(maxsize=8)
def _twist(size: int, length: int, device: torch.device) -> Tensor:
    """[2, L]: real and imaginary parts of w^n, w = exp(i pi / (2 size))."""
    angle = torch.arange(length, dtype=torch.float64, device=device) * (math.pi / (2 * size))
    return torch.stack([angle.cos(), angle.sin()]).float()
