"""The short convolution: forward as a part of other kernels, backward as a kernel of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def taps(P, base, n, W, B, row, ok, K: tl.constexpr):
    """Short causal convolution at positions n of the row at P + base, by row `row` of W [R, K] and B [R]; 0 unless
    ok."""
    total = tl.zeros(n.shape, tl.float32) + tl.load(B + row).to(tl.float32)
    for j in tl.static_range(K):
        x = tl.load(P + base + (n - j), mask=ok & (n >= j), other=0.0).to(tl.float32)
        total += tl.load(W + row * K + (K - 1 - j)).to(tl.float32) * x
    return tl.where(ok, total, 0.0)


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
    ok = n < L
    p = P + (b.to(tl.int64) * (3 * C) + weights) * L
    dq = DQ + (b.to(tl.int64) * rows + row) * L
    halo = HALO + ((b.to(tl.int64) * rows + row) * blocks + block) * HALO_SIZE
    sums = SUMS + ((b.to(tl.int64) * blocks + block) * rows + row) * (K + 1)
    g = tl.load(dq + n, mask=ok, other=0.0).to(tl.float32)
    dp = g * tl.load(W + weights * K + (K - 1)).to(tl.float32)
    x = tl.load(p + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(sums + (K - 1), tl.sum(g * x))
    tl.store(sums + K, tl.sum(g))
    for j in tl.static_range(1, K):
        later = tl.load(dq + (n + j), mask=n + j < L, other=0.0).to(tl.float32)
        dp += later * tl.load(W + weights * K + (K - 1 - j)).to(tl.float32)
        x = tl.load(p + (n - j), mask=ok & (i >= j), other=0.0).to(tl.float32)
        x += tl.load(halo + (j - 1 - i), mask=ok & (i < j) & (n >= j), other=0.0).to(tl.float32)
        tl.store(sums + (K - 1 - j), tl.sum(g * x))
    tl.debug_barrier()  # every input of the block was read before its first gradient is written
    tl.store(p + n, dp.to(P.dtype.element_ty), mask=ok)


def backward(dq: Tensor, p: Tensor, weight: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Writes the gradient at p[:, :, part], p [B, 3, C, L], over it, from dq [B, 3, c, L]; returns those at the weight
    [3, c, K] and at the bias [3, c]."""
    batch, _, channels, length = p.shape
    here, kernel = part.stop - part.start, weight.shape[1]
    blocks = triton.cdiv(length, BLOCK)
    halo_size = max(1, kernel - 1)
    before = torch.arange(blocks, device=p.device)[:, None] * BLOCK - 1 - torch.arange(halo_size, device=p.device)
    halo = p[:, :, part][..., before.clamp(0)]
    sums = torch.empty(batch, blocks, 3, here, kernel + 1, dtype=torch.float32, device=p.device)
    short_backward[(blocks, 3 * here, batch)](dq, p, halo, sums, weight, length, channels, part.start, K=kernel,
                                              HALO_SIZE=halo_size, BLOCK=BLOCK, num_warps=WARPS)
    total = sums.sum((0, 1))
    return total[..., :kernel], total[..., kernel]
