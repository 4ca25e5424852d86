"""What stands around the long convolution of a slice of the tokens (`ops.across`), of order 2: the short convolution,
whose first tokens read a halo of the rank on the left, and the gates, one pass each.

p [B, 3, C, l] is the projection of the slice, halo [B, 3, C, K - 1] that of the tokens before it; weight [3 C, K], bias
[3 C]; positions int32 [B, l], of every token in its segment, or None.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.triton import short
from hyena_dist.ops.triton.given import new
from hyena_dist.ops.triton.plans import GROUP_ELEMENTS
from hyena_dist.ops.triton.short import from_places

BLOCK = 1024
WARPS = 4


@triton.jit
def slice_taps(P, HALO, POSITIONS, W, B, b, k, c, C, L, n, K: tl.constexpr, SEGMENTS: tl.constexpr):
    """The short convolution of block k of P [B, 3, C, L] at tokens n of a slice."""
    row = k * C + c
    at = b.to(tl.int64) * (3 * C) + row
    p, halo, position = P + at * L, HALO + at * (K - 1), POSITIONS + b.to(tl.int64) * L
    total = tl.load(B + row).to(tl.float32) + tl.load(W + row * K + (K - 1)).to(tl.float32) * tl.load(
        p + n, mask=n < L, other=0.0).to(tl.float32)
    for j in tl.static_range(1, K):
        x = tl.load(p + (n - j), mask=(n >= j) & (n < L), other=0.0).to(tl.float32)
        x += tl.load(halo + (K - 1 + n - j), mask=(n < j) & (n < L), other=0.0).to(tl.float32)
        total += tl.load(W + row * K + (K - 1 - j)).to(tl.float32) * from_places(x, position, n, L, j, SEGMENTS)
    return total


@triton.jit(do_not_specialize=["C"])
def enter_slice(P, HALO, POSITIONS, W, B, U, DU, DQ, C, c0, here, L, K: tl.constexpr, SEGMENTS: tl.constexpr,
                BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """U [B, C, L] <- x1 v; or with BACKWARD DQ [B, 2, here, L] <- the gradients at x1 and v, channels c0 and on, from
    DU [B, C, L]. Grid (L / BLOCK, here, B)."""
    i, b = tl.program_id(1), tl.program_id(2)
    c = c0 + i
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (b.to(tl.int64) * C + c) * L + n
    x1 = slice_taps(P, HALO, POSITIONS, W, B, b, 1, c, C, L, n, K, SEGMENTS)
    v = slice_taps(P, HALO, POSITIONS, W, B, b, 2, c, C, L, n, K, SEGMENTS)
    if BACKWARD:
        du = tl.load(DU + at, mask=n < L, other=0.0).to(tl.float32)
        dq = DQ + (b.to(tl.int64) * (2 * here) + i) * L + n
        tl.store(dq, (du * v).to(DQ.dtype.element_ty), mask=n < L)
        tl.store(dq + tl.cast(here, tl.int64) * L, (du * x1).to(DQ.dtype.element_ty), mask=n < L)
    else:
        tl.store(U + at, (x1 * v).to(U.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["C"])
def leave_slice(P, HALO, POSITIONS, W, B, CONV, Y, DQ, C, L, K: tl.constexpr, SEGMENTS: tl.constexpr,
                BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Y [B, C, L] <- x0 CONV; with BACKWARD Y holds the gradient there, DQ [B, 1, C, L] <- that at x0, and CONV <- that
    at it. Grid (L / BLOCK, C, B)."""
    c, b = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (b.to(tl.int64) * C + c) * L + n
    x0 = slice_taps(P, HALO, POSITIONS, W, B, b, 0, c, C, L, n, K, SEGMENTS)
    conv = tl.load(CONV + at, mask=n < L, other=0.0).to(tl.float32)
    if BACKWARD:
        dy = tl.load(Y + at, mask=n < L, other=0.0).to(tl.float32)
        tl.debug_barrier()  # both were read before their places are taken
        tl.store(DQ + at, (dy * conv).to(DQ.dtype.element_ty), mask=n < L)
        tl.store(CONV + at, (dy * x0).to(CONV.dtype.element_ty), mask=n < L)
    tl.store(Y + at, (x0 * conv).to(Y.dtype.element_ty), mask=n < L)


@torch.library.custom_op("hyena::enter_slice", mutates_args=())
def enter(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> Tensor:
    """u = x1 v, [B, C, l]."""
    batch, _, channels, length = p.shape
    u = new(p, batch, channels, length, dtype=p.dtype)
    with torch.cuda.device_of(p):
        enter_slice[_grid(p, channels)](*_given(p, halo, weight, bias, positions), u, u, u, channels, 0, channels,
                                        length, BACKWARD=False, **_constants(weight, positions))
    return u


@torch.library.custom_op("hyena::leave_slice", mutates_args=())
def leave(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None, conv: Tensor) -> Tensor:
    """x0 conv, [B, C, l]."""
    y = torch.empty_like(conv, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(p):
        leave_slice[_grid(p, p.shape[2])](*_given(p, halo, weight, bias, positions), conv.contiguous(), y, y,
                                          p.shape[2], p.shape[3], BACKWARD=False, **_constants(weight, positions))
    return y


@torch.library.custom_op("hyena::leave_slice_backward", mutates_args=("p", "conv", "dy"))
def leave_backward(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None, conv: Tensor,
                   dy: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient at x0's block over it, that at conv over it, and x0 conv over dy; conv and dy are contiguous.
    Returns the gradient at x0's halo [B, 1, C, K - 1], and at the weights, [1, C, K + 1], the bias' last."""
    batch, _, channels, length = p.shape
    dq = new(p, batch, 1, channels, length, dtype=p.dtype)
    with torch.cuda.device_of(p):
        leave_slice[_grid(p, channels)](*_given(p, halo, weight, bias, positions), conv, dy, dq, channels, length,
                                        BACKWARD=True, **_constants(weight, positions))
        return _short(dq, p[:, :1], halo[:, :1], weight.unflatten(0, (3, -1))[:1], 0, positions)


@torch.library.custom_op("hyena::enter_slice_backward", mutates_args=("p",))
def enter_backward(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None,
                   du: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradients at the blocks of x1 and v over them, from du [B, C, l] at u. Returns those at their halo
    [B, 2, C, K - 1], and at the weights, [2, C, K + 1]."""
    batch, _, channels, length = p.shape
    du, last_two, taps = du.contiguous(), slice(1, None), weight.unflatten(0, (3, -1))[1:]
    found = []
    step = max(1, GROUP_ELEMENTS // (batch * length))
    with torch.cuda.device_of(p):
        for first in range(0, channels, step):
            part = slice(first, min(first + step, channels))
            here = part.stop - first
            dq = new(p, batch, 2, here, length, dtype=p.dtype)
            enter_slice[_grid(p, here)](*_given(p, halo, weight, bias, positions), du, du, dq, channels, first, here,
                                        length, BACKWARD=True, **_constants(weight, positions))
            found.append(_short(dq, p[:, last_two, part], halo[:, last_two, part], taps, first, positions))
    dhalo, sums = zip(*found, strict=True)
    return torch.cat(dhalo, dim=2), torch.cat(sums, dim=1)


def _short(dq: Tensor, p: Tensor, halo: Tensor, weight: Tensor, first: int,
           positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of `short.backward`: at the halo [B, blocks, c, K - 1], and at the weights [blocks, c, K + 1]."""
    sums = new(p, *p.shape[1:3], weight.shape[2] + 1)
    short.backward(dq, p, weight, first, positions, sums, halo)
    dhalo = torch.zeros_like(halo, dtype=torch.float32, memory_format=torch.contiguous_format)
    taps = weight[:, first : first + p.shape[2]].float()
    for j in range(1, weight.shape[2]):
        reached = dq[..., :j].float()
        if positions is not None:
            reached = reached * (positions[:, None, None, :j] >= j)
        dhalo[..., -j:] += reached * taps[..., -1 - j, None]
    return dhalo.to(halo.dtype), sums


def _given(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
    assert p.is_contiguous(), p.stride()
    return p, halo.contiguous(), p if positions is None else positions, weight, bias


def _constants(weight: Tensor, positions: Tensor | None) -> dict[str, int | bool]:
    return {"K": weight.shape[1], "SEGMENTS": positions is not None, "BLOCK": BLOCK, "num_warps": WARPS}


def _grid(p: Tensor, channels: int) -> tuple[int, int, int]:
    return triton.cdiv(p.shape[-1], BLOCK), channels, len(p)


def _gradients(blocks: slice, p: Tensor, halo: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    some = halo[:, blocks]
    return torch.empty_like(some, memory_format=torch.contiguous_format), p.new_empty(
        some.shape[1], p.shape[2], weight.shape[1] + 1, dtype=torch.float32)


enter.register_fake(lambda p, *_: p.new_empty(len(p), *p.shape[2:]))
leave.register_fake(lambda _p, _halo, _weight, _bias, _positions, conv: torch.empty_like(conv))
leave_backward.register_fake(lambda p, halo, weight, *_: _gradients(slice(1), p, halo, weight))
enter_backward.register_fake(lambda p, halo, weight, *_: _gradients(slice(1, None), p, halo, weight))
declare_cost("hyena::enter_slice", lambda p, *_: Cost(p.nbytes, 0.0, 1))
declare_cost("hyena::leave_slice", lambda p, _halo, _weight, _bias, _positions, conv: Cost(
    p.nbytes / 3 + 2 * conv.nbytes, 0.0, 1))
declare_cost("hyena::leave_slice_backward", lambda p, _halo, weight, _bias, _positions, conv, dy: Cost(
    5 * p.nbytes / 3 + 2 * conv.nbytes + 2 * dy.nbytes, 0.0, 4 + 3 * weight.shape[1]))
declare_cost("hyena::enter_slice_backward", lambda p, _halo, weight, _bias, _positions, du: Cost(
    10 * p.nbytes / 3 + du.nbytes, 0.0, 5 + 3 * weight.shape[1]))
