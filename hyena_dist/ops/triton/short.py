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
    """Short causal convolution at positions n of the row of L at P + base, by row `row` of W [R, K] and B [R]; with
    K = 0 the row as it is; 0 outside."""
    if K == 0:
        return tl.load(P + base + n, mask=n < L, other=0.0).to(tl.float32)
    else:
        return convolved(P, base, n, L, W, B, row, K)


@triton.jit
def convolved(P, base, n, L, W, B, row, K: tl.constexpr):
    """n begins at an even number: elements come two at a time, and those at an odd distance are of the pairs on either
    side."""
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


@triton.jit
def from_places(x, POSITION, n, L, j: tl.constexpr, SEGMENTS: tl.constexpr):
    """x, what goes from token n - j to token n; 0 where a segment begins between them."""
    if SEGMENTS:
        return tl.where(tl.load(POSITION + n, mask=(n >= 0) & (n < L), other=0) >= j, x, 0.0)
    else:
        return x


@triton.jit(do_not_specialize=["C", "c0"])
def short_backward(DQ, P, HALO, SUMS, W, POSITIONS, L, p_b, p_block, p_c, C, c0, BLOCKS: tl.constexpr, K: tl.constexpr,
                   HALO_SIZE: tl.constexpr, LEFT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """From the gradient at the short convolution's results, DQ [B, blocks, c, L], that at its inputs, which takes their
    place in P [B, blocks, c, L], channels c0 and on of C, and SUMS [B, programs, blocks, c, K + 1]: the program's sums
    for each tap and for the bias. HALO [B, blocks, c, programs, HALO_SIZE]: the inputs before each program's tokens,
    nearest first, because their place may already hold gradients; LEFT: there are inputs before the row. POSITIONS
    int32 [B, L]: of each token in its segment. Grid (programs, blocks c, B)."""
    program, row, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    programs, rows = tl.num_programs(0), tl.num_programs(1)
    here = rows // BLOCKS
    weights = (row // here) * C + c0 + row % here
    i = tl.arange(0, BLOCK)
    n = program * BLOCK + i
    batch = b.to(tl.int64)
    p = P + batch * p_b + (row // here).to(tl.int64) * p_block + (row % here).to(tl.int64) * p_c
    dq = DQ + (batch * rows + row) * L
    halo = HALO + ((batch * rows + row) * programs + program) * HALO_SIZE
    sums = SUMS + ((batch * programs + program) * rows + row) * (K + 1)
    position = POSITIONS + batch * L
    g, g_odd = pairs(tl.load(dq + n, mask=n < L, other=0.0).to(tl.float32))
    x, x_odd = pairs(tl.load(p + n, mask=n < L, other=0.0).to(tl.float32))
    tl.store(sums + (K - 1), tl.sum(g * x + g_odd * x_odd))
    tl.store(sums + K, tl.sum(g + g_odd))
    w = tl.load(W + weights * K + (K - 1)).to(tl.float32)
    dp, dp_odd = w * g, w * g_odd
    if SEGMENTS:
        for j in tl.static_range(1, K):
            w = tl.load(W + weights * K + (K - 1 - j)).to(tl.float32)
            later = tl.load(dq + (n + j), mask=n + j < L, other=0.0).to(tl.float32)
            later, later_odd = pairs(from_places(later, position, n + j, L, j, SEGMENTS))
            dp += w * later
            dp_odd += w * later_odd
            before = from_places(inputs_before(p, halo, i, n, j, L, LEFT), position, n, L, j, SEGMENTS)
            before, before_odd = pairs(before)
            tl.store(sums + (K - 1 - j), tl.sum(g * before + g_odd * before_odd))
    else:
        odd = g_odd
        for j in tl.static_range(2, K + 1, 2):
            even_later, odd_later = pairs(tl.load(dq + (n + j), mask=n + j < L, other=0.0).to(tl.float32))
            x_before, x_odd_before = pairs(inputs_before(p, halo, i, n, j, L, LEFT))
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
    tl.debug_barrier()  # every input of the program was read before its first gradient is written
    tl.store(p + n, tl.interleave(dp, dp_odd).to(P.dtype.element_ty), mask=n < L)


@triton.jit
def inputs_before(p, halo, i, n, j, L, LEFT: tl.constexpr):
    """The inputs j before the program's tokens n, of which i counts."""
    before = tl.load(p + (n - j), mask=(i >= j) & (n < L + j), other=0.0).to(tl.float32)
    inside = i < j if LEFT else (i < j) & (n >= j)
    return before + tl.load(halo + (j - 1 - i), mask=inside, other=0.0).to(tl.float32)


def backward(dq: Tensor, p: Tensor, weight: Tensor, first: int, positions: Tensor | None, sums: Tensor,
             left: Tensor | None = None) -> None:
    """Writes the gradient at p [B, blocks, c, L], channels `first` and on of those of weight [blocks, C, K], over it,
    from dq, contiguous and of the same shape, and those at the weight and the bias to sums [blocks, c, K + 1], the
    bias' last.

    Args:
        positions: int32 [B, L], of every token in its segment; None: each row is one.
        left: [B, blocks, c, K - 1], the inputs before the rows; None: zeros.
    """
    batch, blocks, here, length = p.shape
    kernel = weight.shape[-1]
    halo_size = max(1, kernel - kernel % 2)
    before = _before_programs(length, halo_size, p.device)
    programs = len(before)
    halo = p[..., before]
    if left is not None:
        halo[..., 0, :] = 0
        halo[..., 0, : kernel - 1] = left.flip(-1)
    partial = torch.empty(batch, programs, blocks, here, kernel + 1, dtype=torch.float32, device=p.device)
    short_backward[(programs, blocks * here, batch)](
        dq, p, halo, partial, weight, dq if positions is None else positions, length, *p.stride()[:3], weight.shape[1],
        first, BLOCKS=blocks, K=kernel, HALO_SIZE=halo_size, LEFT=left is not None, SEGMENTS=positions is not None,
        BLOCK=BLOCK, num_warps=WARPS)
    torch.sum(partial, (0, 1), out=sums)


@lru_cache(maxsize=8)
def _before_programs(length: int, count: int, device: torch.device) -> Tensor:
    """[programs, count]: the places before the tokens of each program, the nearest first; any before the first."""
    starts = torch.arange(0, length, BLOCK, device=device)
    return (starts[:, None] - 1 - torch.arange(count, device=device)).clamp(0)
