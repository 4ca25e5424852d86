"""How a length is cut into factors, and with which options its kernels are launched."""

from dataclasses import dataclass, field
from typing import Any

import torch

Options = dict[str, Any]

WIDE_MEMORY = 227 * 2**10
"""Shared memory of a program with which the tiles of 128 rows fit."""

MOST_TAPS = 8
"""Of the short convolution."""

IN_ORDER = {"num_stages": 1}
"""No load before its turn in a loop: it could be of what the turn before has yet to store, and its copies in shared
memory cost a second program there."""

GROUP_ELEMENTS = 2**27
"""Elements of a group of channels, which go through the kernels together. In the backward pass each has 8 bytes of
intermediate results (float32: 16), 6 (12) of gradients at the short convolution's results, and for each of the filters
8 (16) of spectra where the batch is one row, else 16 (24)."""

WIDE_SHAPES = (64, 64, 32), (128, 64, 256), (128, 128, 256)
PRECISE_SHAPES = ((64, 64, 128),)
"""Rows of r1 r2 points, the smallest that will do, and how many points of columns they take at most, 64 without
WIDE_MEMORY. Precise rows are at most 64 by 64: what is twice as large spills registers by the kilobyte, as 128 by 128
does.

No tile of 64 rows has 32 columns: with four warps, the assembler of CUDA 12.8, which Triton 3.6 and 3.7 bring along,
mistakes where the operands of its products lie in shared memory (`tests/machine_code.py` finds it)."""

MEASURED = frozenset({(32, 32), (16, 4096), (32, 4096), (128, 8192)})
"""Rows of a column's table and points of a row, (m, n2), of the plans for half precision that ran on a device, an H100,
on 2026-11-26: 513 to 1,024 tokens, 8,193 to 131,072, and 524,289 to 1,048,576. What was changed in the kernels since,
which a compiler and an interpreter have seen, is in docs/performance.md."""


@dataclass(frozen=True)
class SmallPlan:
    """One kernel for each direction: n1 n2 >= L points, n1 padded to m rows."""

    n1: int
    m: int
    n2: int
    forward: Options = field(default_factory=dict)
    backward: Options = field(default_factory=dict)
    filters: Options = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        return {"M": self.m, "N2": self.n2}


@dataclass(frozen=True)
class LargePlan:
    """Three kernels: columns of n1 points, padded to m and made in blocks of mb, and rows of r1 r2. Columns go `tile`
    at a time on the way in, a multiple of r2."""

    n1: int
    m: int
    mb: int
    r1: int
    r2: int
    tile: int
    columns: Options = field(default_factory=dict)
    rows: Options = field(default_factory=dict)
    rows_backward: Options = field(default_factory=dict)
    leave: Options = field(default_factory=lambda: {"BC": 16})
    leave_backward: Options = field(default_factory=lambda: {"BC": 16})
    filters: Options = field(default_factory=dict)
    filter_rows: Options = field(default_factory=dict)

    @property
    def n2(self) -> int:
        return self.r1 * self.r2

    @property
    def column_shape(self) -> dict[str, int]:
        return {"M": self.m, "MB": self.mb, "N2": self.n2}

    @property
    def row_shape(self) -> dict[str, int]:
        return {"R1": self.r1, "R2": self.r2}


def plan_for(length: int, precise: bool, wide: bool) -> SmallPlan | LargePlan | None:
    """For rows of `length` tokens; None: too long, or float32 where its tiles, of 112 KiB, do not fit.

    Args:
        precise: float32 activations, not half precision.
        wide: the device has WIDE_MEMORY.
    """
    if precise and not wide:
        return None
    if length <= (8192 if wide and not precise else 4096):
        return _small_plan(length, columns_of_64=precise or not wide)
    for r1, r2, most in PRECISE_SHAPES if precise else WIDE_SHAPES if wide else WIDE_SHAPES[:1]:
        if length <= (most if wide else 64) * r1 * r2:
            return large_plan(length, r1, r2, columns_of_64=precise or not wide)
    return None


def wide_memory(device: torch.device) -> bool:
    """Whether a device's programs have WIDE_MEMORY. Triton's interpreter takes any."""
    return device.type != "cuda" or (
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= WIDE_MEMORY)


def measured(length: int) -> bool:
    """Whether rows of this length in half precision have a plan in MEASURED, on a device of WIDE_MEMORY."""
    plan = plan_for(length, precise=False, wide=True)
    return plan is not None and (plan.m, plan.n2) in MEASURED and (plan.m < 128 or plan.n1 > 64)


def _small_plan(length: int, *, columns_of_64: bool) -> SmallPlan:
    n2 = 32 if length <= 1024 else 64
    n1 = -(-length // n2)
    m = _padded(n1, columns_of_64)
    options = {"num_warps": max(2, m // 16), **IN_ORDER}
    return SmallPlan(n1, m, n2, forward=options, backward=options, filters=options)


def large_plan(length: int, r1: int, r2: int, *, columns_of_64: bool = True) -> LargePlan:
    """With rows of r1 r2 points, both powers of two."""
    n1 = -(-length // (r1 * r2))
    m = _padded(n1, columns_of_64)
    mb = min(m, 128)
    columns, rows = {"num_warps": max(2, mb // 16), **IN_ORDER}, {"num_warps": r1 // 16, **IN_ORDER}
    leave = {"BC": 64, "num_warps": 8, **IN_ORDER} if mb == 64 else {"BC": 32, **columns}
    return LargePlan(n1, m, mb, r1, r2, max(64, r2), columns=columns, rows=rows, rows_backward=rows, leave=leave,
                     leave_backward=leave, filters=columns, filter_rows=rows)


def _padded(n: int, columns_of_64: bool) -> int:
    """The next power of two, at least 16: rows of a table on the tensor cores.

    On an H100 a step of 262,144 tokens, with columns of 64 points, ended in an illegal memory access, because their
    tiles had 32 columns in `leave` and `leave_backward` (see WIDE_SHAPES). They have 64 now, whose machine code is
    right. Until that has run on a card, half precision takes columns of 128 in their place."""
    m = max(16, 1 << (n - 1).bit_length())
    return m if columns_of_64 or m != 64 else 128
