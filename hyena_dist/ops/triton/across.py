"""What stands around the long convolutions of a slice of the tokens (`ops.across`), of any order N: the short
convolution, whose first tokens read a halo of the rank on the left, the product that the first convolution reads, and
the gate of the last one, one pass each.

p [B, N + 1, C, l] is the projection of the slice, its blocks are x0, x1, ..., v; halo [B, N + 1, C, K - 1] is that of
the tokens before it; weight [(N + 1) C, K], bias [(N + 1) C]; positions int32 [B, l], of every token in its segment, or
None.
"""

from collections.abc import Sequence

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
def slice_taps(P, HALO, POSITIONS, W, B, b, k, c, C, L, n, BLOCKS: tl.constexpr, K: tl.constexpr,
               SEGMENTS: tl.constexpr):
    """The short convolution of block k of P [B, BLOCKS, C, L] at tokens n of a slice."""
    row = k * C + c
    at = b.to(tl.int64) * (BLOCKS * C) + row
    p, halo, position = P + at * L, HALO + at * (K - 1), POSITIONS + b.to(tl.int64) * L
    total = tl.load(B + row).to(tl.float32) + tl.load(W + row * K + (K - 1)).to(tl.float32) * tl.load(
        p + n, mask=n < L, other=0.0).to(tl.float32)
    for j in tl.static_range(1, K):
        x = tl.load(p + (n - j), mask=(n >= j) & (n < L), other=0.0).to(tl.float32)
        x += tl.load(halo + (K - 1 + n - j), mask=(n < j) & (n < L), other=0.0).to(tl.float32)
        total += tl.load(W + row * K + (K - 1 - j)).to(tl.float32) * from_places(x, position, n, L, j, SEGMENTS)
    return total


@triton.jit(do_not_specialize=["C"])
def enter_slice(P, HALO, POSITIONS, W, B, U, DU, DQ, C, c0, here, L, BLOCKS: tl.constexpr, K: tl.constexpr,
                SEGMENTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """U [N - 1, B, C, L] <- the last gate times v, and the gates before it, the last of them first; or with BACKWARD
    DQ [B, 2, here, L] <- the gradients at the last gate and v, channels c0 and on, from DU [B, C, L]. Grid (L / BLOCK,
    here, B)."""
    i, b = tl.program_id(1), tl.program_id(2)
    c = c0 + i
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (b.to(tl.int64) * C + c) * L + n
    gate = slice_taps(P, HALO, POSITIONS, W, B, b, BLOCKS - 2, c, C, L, n, BLOCKS, K, SEGMENTS)
    v = slice_taps(P, HALO, POSITIONS, W, B, b, BLOCKS - 1, c, C, L, n, BLOCKS, K, SEGMENTS)
    if BACKWARD:
        du = tl.load(DU + at, mask=n < L, other=0.0).to(tl.float32)
        dq = DQ + (b.to(tl.int64) * (2 * here) + i) * L + n
        tl.store(dq, (du * v).to(DQ.dtype.element_ty), mask=n < L)
        tl.store(dq + tl.cast(here, tl.int64) * L, (du * gate).to(DQ.dtype.element_ty), mask=n < L)
    else:
        tl.store(U + at, (gate * v).to(U.dtype.element_ty), mask=n < L)
        for place in tl.static_range(1, BLOCKS - 2):
            gate = slice_taps(P, HALO, POSITIONS, W, B, b, BLOCKS - 2 - place, c, C, L, n, BLOCKS, K, SEGMENTS)
            row = (place * tl.num_programs(2) + b).to(tl.int64) * C + c
            tl.store(U + row * L + n, gate.to(U.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["C"])
def leave_slice(P, HALO, POSITIONS, W, B, CONV, Y, DQ, C, L, BLOCKS: tl.constexpr, K: tl.constexpr,
                SEGMENTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Y [B, C, L] <- x0 CONV; with BACKWARD Y holds the gradient there, DQ [B, 1, C, L] <- that at x0, and CONV <- that
    at it. Grid (L / BLOCK, C, B)."""
    c, b = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (b.to(tl.int64) * C + c) * L + n
    x0 = slice_taps(P, HALO, POSITIONS, W, B, b, 0, c, C, L, n, BLOCKS, K, SEGMENTS)
    conv = tl.load(CONV + at, mask=n < L, other=0.0).to(tl.float32)
    if BACKWARD:
        dy = tl.load(Y + at, mask=n < L, other=0.0).to(tl.float32)
        tl.debug_barrier()  # both were read before their places are taken
        tl.store(DQ + at, (dy * conv).to(DQ.dtype.element_ty), mask=n < L)
        tl.store(CONV + at, (dy * x0).to(CONV.dtype.element_ty), mask=n < L)
    tl.store(Y + at, (x0 * conv).to(Y.dtype.element_ty), mask=n < L)


@torch.library.custom_op("hyena::enter_slice", mutates_args=())
def enter(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> Tensor:
    """What the long convolutions read, [N - 1, B, C, l]: u = x_{N-1} v, then the gates between two convolutions in the
    order of their use, x_{N-2}, ..., x_1."""
    batch, blocks, channels, length = p.shape
    packed = new(p, blocks - 2, batch, channels, length, dtype=p.dtype)
    with torch.cuda.device_of(p):
        enter_slice[_grid(p, channels)](*_given(p, halo, weight, bias, positions), packed, packed, packed, channels, 0,
                                        channels, length, BACKWARD=False, **_constants(p, weight, positions))
    return packed


@torch.library.custom_op("hyena::leave_slice", mutates_args=())
def leave(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None, conv: Tensor) -> Tensor:
    """x0 conv, [B, C, l]."""
    y = torch.empty_like(conv, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(p):
        leave_slice[_grid(p, p.shape[2])](*_given(p, halo, weight, bias, positions), conv.contiguous(), y, y,
                                          p.shape[2], p.shape[3], BACKWARD=False, **_constants(p, weight, positions))
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
                                        BACKWARD=True, **_constants(p, weight, positions))
        return _short_of(slice(1), dq, p, halo, weight, positions)


@torch.library.custom_op("hyena::enter_slice_backward", mutates_args=("p",))
def enter_backward(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None,
                   dinputs: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradients at the blocks x1, ..., v over them, from those at what `enter` makes, [N - 1, B, C, l].
    Returns those at their halo [B, N, C, K - 1], and at the weights, [N, C, K + 1]."""
    du, *inner = dinputs
    with torch.cuda.device_of(p):
        # The inner gates were sent as they are, so theirs come back; u is a product, whose factors' are to be found.
        found = [_short_of(slice(k, k + 1), gradient.contiguous()[:, None], p, halo, weight, positions)
                 for k, gradient in enumerate(reversed(inner), start=1)]
        found.append(_product_backward(p, halo, weight, bias, positions, du.contiguous()))
    dhalo, sums = zip(*found, strict=True)
    return _joined(dhalo, 1), _joined(sums, 0)


def _product_backward(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None,
                      du: Tensor) -> tuple[Tensor, Tensor]:
    """`enter_backward` of the last gate's block and v's, from du [B, C, l], some channels after the others."""
    batch, blocks, channels, length = p.shape
    last_two = slice(blocks - 2, None)
    taps = weight.unflatten(0, (blocks, -1))[last_two]
    found = []
    step = _channel_step(batch, length)
    for first in range(0, channels, step):
        part = slice(first, min(first + step, channels))
        here = part.stop - first
        dq = new(p, batch, 2, here, length, dtype=p.dtype)
        enter_slice[_grid(p, here)](*_given(p, halo, weight, bias, positions), du, du, dq, channels, first, here,
                                    length, BACKWARD=True, **_constants(p, weight, positions))
        found.append(_short(dq, p[:, last_two, part], halo[:, last_two, part], taps, first, positions))
    dhalo, sums = zip(*found, strict=True)
    return _joined(dhalo, 2), _joined(sums, 1)


def _channel_step(batch: int, length: int) -> int:
    """How many channels go through `_product_backward` together."""
    return max(1, GROUP_ELEMENTS // (batch * length))


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]


def _short_of(blocks: slice, dq: Tensor, p: Tensor, halo: Tensor, weight: Tensor,
              positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_short` of all channels of some blocks of p."""
    taps = weight.unflatten(0, (p.shape[1], -1))
    return _short(dq, p[:, blocks], halo[:, blocks], taps[blocks], 0, positions)


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
        dhalo[..., -j:].add_(reached * taps[..., -1 - j, None])
    return dhalo.to(halo.dtype), sums


def _given(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
    assert p.is_contiguous(), p.stride()
    return p, halo.contiguous(), p if positions is None else positions, weight, bias


def _constants(p: Tensor, weight: Tensor, positions: Tensor | None) -> dict[str, int | bool]:
    return {"BLOCKS": p.shape[1], "K": weight.shape[1], "SEGMENTS": positions is not None, "BLOCK": BLOCK,
            "num_warps": WARPS}


def _grid(p: Tensor, channels: int) -> tuple[int, int, int]:
    return triton.cdiv(p.shape[-1], BLOCK), channels, len(p)


def _gradients(blocks: slice, p: Tensor, halo: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    some = halo[:, blocks]
    return torch.empty_like(some, memory_format=torch.contiguous_format), p.new_empty(
        some.shape[1], p.shape[2], weight.shape[1] + 1, dtype=torch.float32)


enter.register_fake(lambda p, *_: p.new_empty(p.shape[1] - 2, len(p), *p.shape[2:]))
leave.register_fake(lambda _p, _halo, _weight, _bias, _positions, conv: torch.empty_like(conv))
leave_backward.register_fake(lambda p, halo, weight, *_: _gradients(slice(1), p, halo, weight))
enter_backward.register_fake(lambda p, halo, weight, *_: _gradients(slice(1, None), p, halo, weight))


def _block(p: Tensor) -> float:
    """Bytes of one block."""
    return p.nbytes / p.shape[1]


def _short_launches(p: Tensor, weight: Tensor, positions: Tensor | None) -> int:
    """Of `_short`, most of them for the few tokens of the halo."""
    half, of_each_tap = p.dtype != torch.float32, 2 + 2 * (positions is not None)
    return 7 + half + (weight.dtype != torch.float32) + (weight.shape[1] - 1) * (of_each_tap + half)


def _enter_backward_cost(p: Tensor, _halo: Tensor, weight: Tensor, _bias: Tensor, positions: Tensor | None,
                         dinputs: Tensor) -> Cost:
    batch, blocks, channels, length = p.shape
    inner, groups = blocks - 3, -(-channels // _channel_step(batch, length))
    of_short = _short_launches(p, weight, positions)
    return Cost((10 + 2 * inner) * _block(p) + dinputs.nbytes, 0.0,
                (groups + inner) * of_short + groups + 2 * (groups > 1) + 2 * (inner > 0))


declare_cost("hyena::enter_slice", lambda p, *_: Cost((2 * p.shape[1] - 3) * _block(p), 0.0, 1))
declare_cost("hyena::leave_slice", lambda p, _halo, _weight, _bias, _positions, conv: Cost(
    _block(p) + 2 * conv.nbytes, 0.0, 1))
declare_cost("hyena::leave_slice_backward", lambda p, _halo, weight, _bias, positions, conv, dy: Cost(
    5 * _block(p) + 2 * conv.nbytes + 2 * dy.nbytes, 0.0, 1 + _short_launches(p, weight, positions)))
declare_cost("hyena::enter_slice_backward", _enter_backward_cost)
