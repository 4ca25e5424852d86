"""The short convolution: forward as a part of other kernels, backward as a kernel of its own."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def pairs(x):
    """[..., n] -> its elements of even and of odd places, each [..., n / 2]: in a thread's own registers."""
    if len(x.shape) == 1:
        return tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    else:
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def taps(P, base, n, L, W, B, row, K: tl.constexpr):
    """Short causal convolution at positions n of the row of L at P + base, by row `row` of W [R, K] and B [R]; 0
    outside. n begins at an even number: elements come two at a time, and those at an odd distance are of the pairs on
    either side."""
    w = tl.load(W + row * K + (K - 1)).to(tl.float32)
    bias = tl.load(B + row).to(tl.float32)
    even, odd = pairs(tl.load(P + base + n, mask=n < L, other=0.0).to(tl.float32))
    total_even = bias + w * even
    total_odd = bias + w * odd
    for j in tl.static_range(2, K + 1, 2):
        x = tl.load(P + base + (n - j), mask=(n >= j) & (n < L + j), other=0.0).to(tl.float32)
        even_before, odd_before = pairs(x)
        w = tl.load(W + row * K + (K - j)).to(tl.float32)
        total_even += w * odd_before
        total_odd += w * even
        if j < K:
            w = tl.load(W + row * K + (K - 1 - j)).to(tl.float32)
            total_even += w * even_before
            total_odd += w * odd_before
        even, odd = even_before, odd_before
    return tl.where(n < L, tl.reshape(tl.join(total_even, total_odd), n.shape), 0.0)


@triton.jit(do_not_specialize=["C", "c0"])
def short_backward(DQ, P, HALO, SUMS, W, L, C, c0, K: tl.constexpr, HALO_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """From the gradient at the short convolution's results, DQ [B, 3, c, L], that at its inputs, which takes their
    place in P [B, 3, C, L] from channel c0 on, and SUMS [B, blocks, 3, c, K + 1]: the block's sums for each tap and for
    the bias. HALO [B, 3, c, blocks, HALO_SIZE]: the inputs before each block, nearest first, because their place may
    already hold gradients. Grid (blocks, 3 c, B)."""
    block, row, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    here = rows // 3
    weights = (row // here) * C + c0 + row % here
    i = tl.arange(0, BLOCK)
    n = block * BLOCK + i
    p = P + (b.to(tl.int64) * (3 * C) + weights) * L
    dq = DQ + (b.to(tl.int64) * rows + row) * L
    halo = HALO + ((b.to(tl.int64) * rows + row) * blocks + block) * HALO_SIZE
    sums = SUMS + ((b.to(tl.int64) * blocks + block) * rows + row) * (K + 1)
    g, g_odd = pairs(tl.load(dq + n, mask=n < L, other=0.0).to(tl.float32))
    x, x_odd = pairs(tl.load(p + n, mask=n < L, other=0.0).to(tl.float32))
    tl.store(sums + (K - 1), tl.sum(g * x + g_odd * x_odd))
    tl.store(sums + K, tl.sum(g + g_odd))
    w = tl.load(W + weights * K + (K - 1)).to(tl.float32)
    odd, dp, dp_odd = g_odd, w * g, w * g_odd
    for j in tl.static_range(2, K + 1, 2):
        even_later, odd_later = pairs(tl.load(dq + (n + j), mask=n + j < L, other=0.0).to(tl.float32))
        before = tl.load(p + (n - j), mask=(i >= j) & (n < L + j), other=0.0).to(tl.float32)
        before += tl.load(halo + (j - 1 - i), mask=(i < j) & (n >= j), other=0.0).to(tl.float32)
        x_before, x_odd_before = pairs(before)
        w = tl.load(W + weights * K + (K - j)).to(tl.float32)
        dp += w * odd
        dp_odd += w * even_later
        tl.store(sums + (K - j), tl.sum(g * x_odd_before + g_odd * x))
        if j < K:
            w = tl.load(W + weights * K + (K - 1 - j)).to(tl.float32)
            dp += w * even_later
            dp_odd += w * odd_later
            tl.store(sums + (K - 1 - j), tl.sum(g * x_before + g_odd * x_odd_before))
        odd, x = odd_later, x_before
    tl.debug_barrier()  # every input of the block was read before its first gradient is written
    tl.store(p + n, tl.interleave(dp, dp_odd).to(P.dtype.element_ty), mask=n < L)


def backward(dq: Tensor, p: Tensor, weight: Tensor, part: slice, sums: Tensor) -> None:
    """Writes the gradient at p[:, :, part], p [B, 3, C, L], over it, from dq [B, 3, c, L], and those at the weight and
    the bias to sums [3, c, K + 1], the bias' last."""
    batch, _, channels, length = p.shape
    here, kernel = part.stop - part.start, weight.shape[1]
    halo_size = max(1, kernel - kernel % 2)
    before = _before_blocks(length, halo_size, p.device)
    blocks = len(before)
    halo = p[:, :, part][..., before]
    partial = torch.empty(batch, blocks, 3, here, kernel + 1, dtype=torch.float32, device=p.device)
    short_backward[(blocks, 3 * here, batch)](dq, p, halo, partial, weight, length, channels, part.start, K=kernel,
                                              HALO_SIZE=halo_size, BLOCK=BLOCK, num_warps=WARPS)
    torch.sum(partial, (0, 1), out=sums)


@lru_cache(maxsize=8)
def _before_blocks(length: int, count: int, device: torch.device) -> Tensor:
    """[blocks, count]: the places before each block, the nearest first; any before the first."""
    starts = torch.arange(0, length, BLOCK, device=device)
    return (starts[:, None] - 1 - torch.arange(count, device=device)).clamp(0)
