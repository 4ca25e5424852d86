"""What one long convolution of a group of channels reads, and how kernels find it.

Its input u is the product of the last two blocks of p, or a tensor x of its own; its result may be multiplied by a
block of p, the gate. Blocks go through the short convolution on their way in. Rows are those of the batch, or segments
of them (`ops.segments`), before whose first token neither convolution sees anything.

x, and with it what is written, may be [B, c, L], or [P, B, c, l]: P slices of l tokens of every row, as an all-to-all
between context ranks delivers them.

Every kernel's first arguments are those of `Given.arguments`, and its constants those of `Given.constants`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.triton.short import taps

NO_GATE, NO_BLOCKS = -1, 0


@dataclass(frozen=True)
class Rows:
    """Rows that are convolved together, of one size."""

    count: int
    size: int
    """The most tokens of a row."""
    tokens: int
    """Of all rows."""
    places: Tensor | None = None
    """int32 [count, 3]: the row of the batch, its first token there, and its tokens. None: the rows of the batch."""

    @classmethod
    def whole(cls, p: Tensor) -> "Rows":
        """Those of a batch, [B, ..., L]."""
        return cls(len(p), p.shape[-1], len(p) * p.shape[-1])


@dataclass(frozen=True)
class Given:
    """See the module."""

    p: Tensor
    """[B, blocks, c, L], channels `first` to first + c - 1 of `channels`."""
    x: Tensor | None
    """[B, c, L] or [P, B, c, l], where u is no product."""
    weight: Tensor | None
    """Of the short convolution of all blocks and channels, [blocks, C, K]; None: there is none."""
    bias: Tensor | None
    """[blocks, C]"""
    channels: int
    first: int
    gate: int
    """Which block of p multiplies the result, or NO_GATE."""
    rows: Rows

    @property
    def here(self) -> int:
        """c"""
        return self.p.shape[2]

    @property
    def taps(self) -> int:
        """K"""
        return 0 if self.weight is None else self.weight.shape[-1]

    def arguments(self) -> tuple[Any, ...]:
        """P, X, W, B, PLACES, L, the strides of p and of x, l, C, c0."""
        p, rows = self.p, self.rows
        x = p[:, 0] if self.x is None else self.x
        weight, bias = (p if t is None else t for t in (self.weight, self.bias))
        places = p if rows.places is None else rows.places
        return (p, x, weight, bias, places, rows.size, *p.stride()[:3], *strides(x), x.shape[-1], self.channels,
                self.first)

    def constants(self) -> dict[str, Any]:
        """GATE, BLOCKS, K, SEGMENTS, SLICES. BLOCKS counts those of p, or is NO_BLOCKS where u is x."""
        return {"GATE": self.gate, "BLOCKS": self.p.shape[1] if self.x is None else NO_BLOCKS, "K": self.taps,
                "SEGMENTS": self.rows.places is not None, "SLICES": self.x is not None and self.x.dim() == 4}

    def gradient(self, dy: Tensor) -> "Given":
        """What enters the transform of the gradient at the convolution: dy, which stands as x, times the gate."""
        return replace(self, x=dy)

    def ungated(self) -> "Given":
        """What enters the transform of u."""
        return replace(self, gate=NO_GATE)

    def filters(self, h: Tensor) -> "Given":
        """The same of filters [c, at least as many lags as a row has tokens]."""
        rows = Rows(1, self.rows.size, self.rows.size)
        return replace(self, x=h[None], gate=NO_GATE, rows=rows)

    def moved(self, out: Tensor, backward: bool) -> tuple[float, float, float]:
        """Bytes of one pass over u, over the gate, and over what is written: y, of the dtype of `out`; backward what is
        read of it and written over it, and the gradients at the gate and at u."""
        elements, a = self.here * self.rows.tokens, self.p.itemsize
        u = 2 * a if self.x is None else self.x.itemsize
        gate = a if self.gate != NO_GATE else 0
        written = 2 * out.itemsize + gate + u if backward else out.itemsize
        return u * elements, gate * elements, written * elements


@triton.jit
def place_of(PLACES, b, L, SEGMENTS: tl.constexpr):
    """(row of the batch as int64, first token, tokens) of row b."""
    if SEGMENTS:
        return tl.load(PLACES + 3 * b).to(tl.int64), tl.load(PLACES + 3 * b + 1), tl.load(PLACES + 3 * b + 2)
    else:
        return b.to(tl.int64), 0, L


@triton.jit
def token(n, start, l, step, SLICES: tl.constexpr):
    """Where the tokens n of a row that begins at token `start` stand: one after the other, or in slices of l tokens so
    many elements apart."""
    if SLICES:
        return ((start + n) // l).to(tl.int64) * step + (start + n) % l
    else:
        return start + n


@triton.jit
def factor(p, k, p_block, n, size, W, B, row, C, K: tl.constexpr):
    """Block k of the row that begins at p, through the short convolution; 0 outside."""
    return taps(p, tl.cast(p_block, tl.int64) * k, n, size, W, B, k * C + row, K)


@triton.jit
def gated(y, p, p_block, n, size, W, B, row, C, GATE: tl.constexpr, K: tl.constexpr):
    """y times the gate, if there is one."""
    if GATE >= 0:
        return y * factor(p, GATE, p_block, n, size, W, B, row, C, K)
    else:
        return y


@triton.jit
def entering(p, x, p_block, n, size, W, B, row, C, GATE: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr):
    """What enters a transform at places n of a row: u, or what stands at x, which has their places, times a gate if
    there is one; float32."""
    if BLOCKS > 0:
        u = factor(p, BLOCKS - 2, p_block, n, size, W, B, row, C, K)
        u *= factor(p, BLOCKS - 1, p_block, n, size, W, B, row, C, K)
    else:
        u = tl.load(x, mask=n < size, other=0.0).to(tl.float32)
    return gated(u, p, p_block, n, size, W, B, row, C, GATE, K)


@triton.jit
def store_gradient(du, p, dq, dx, p_block, q_block, n, size, W, B, row, C, BLOCKS: tl.constexpr, K: tl.constexpr):
    """The gradient at u, to the blocks of its factors at dq or as it is to dx, which has its places."""
    if BLOCKS > 0:
        block = tl.cast(q_block, tl.int64)
        x1 = factor(p, BLOCKS - 2, p_block, n, size, W, B, row, C, K)
        v = factor(p, BLOCKS - 1, p_block, n, size, W, B, row, C, K)
        tl.store(dq + block * (BLOCKS - 2) + n, (du * v).to(dq.dtype.element_ty), mask=n < size)
        tl.store(dq + block * (BLOCKS - 1) + n, (du * x1).to(dq.dtype.element_ty), mask=n < size)
    else:
        tl.store(dx, du.to(dx.dtype.element_ty), mask=n < size)


def strides(t: Tensor) -> tuple[int, int, int]:
    """Of rows, channels and slices."""
    if t.dim() == 4:
        return t.stride(1), t.stride(2), t.stride(0)
    return t.stride(0), t.stride(1), 0


def new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor."""
    return torch.empty(*shape, dtype=dtype, device=like.device)
