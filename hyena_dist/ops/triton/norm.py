"""The layer norm of chunks of tokens and its gradients, one pass over memory each. Statistics are computed again where
they are needed: a row is read as a whole anyway.

Rows are those of x [n, D] or [R, T, D], of any strides but the last; what a product reads or gives, n and dn, is
contiguous. A row of n may end in PADDING more columns, a 1 and zeros: the product's weights then have its bias as a
column.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost

TILE = 1024
"""Elements that a warp works on at a time, in whole rows."""

PROGRAMS = 1024
"""The most of a backward pass, each of which sums the weights' gradients of its rows: so few that a large GPU runs all
at a time. A constant, because the order of a sum must not depend on the device."""


@triton.jit
def row_offsets(i, INNER, outer_stride, inner_stride):
    return (i // INNER).to(tl.int64) * outer_stride + (i % INNER).to(tl.int64) * inner_stride


@triton.jit
def standardised(x, inside, eps, D: tl.constexpr):
    """[ROWS, DP] -> (the same of mean 0 and variance 1, the factor [ROWS, 1])."""
    mean = tl.sum(x, 1)[:, None] / D
    c = tl.where(inside, x - mean, 0.0)
    factor = tl.rsqrt(tl.sum(c * c, 1)[:, None] / D + eps)
    return c * factor, factor


@triton.jit(do_not_specialize=["COUNT", "INNER"])
def norm_forward(X, Y, WEIGHT, BIAS, COUNT, INNER, x_outer, x_inner, eps, PADDING: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, ROWS: tl.constexpr):
    """Y [COUNT, D + PADDING] <- the norm of X's rows, each with a 1 and zeros after it. PADDING is 0 or a power of two.
    Grid (COUNT / ROWS,)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    ok = (i < COUNT) & (d < D)
    x = tl.load(X + row_offsets(i, INNER, x_outer, x_inner) + d, mask=ok, other=0.0).to(tl.float32)
    h, _ = standardised(x, d < D, eps, D)
    weight = tl.load(WEIGHT + d, mask=d < D, other=0.0)
    y = h * weight + tl.load(BIAS + d, mask=d < D, other=0.0)
    row = Y + i.to(tl.int64) * (D + PADDING)
    tl.store(row + d, y.to(Y.dtype.element_ty), mask=ok)
    if PADDING:
        column = tl.arange(0, PADDING)[None, :]
        tl.store(row + D + column, tl.where(column == 0, 1.0, 0.0).to(Y.dtype.element_ty), mask=i < COUNT)


@triton.jit(do_not_specialize=["COUNT", "INNER"])
def norm_backward(X, DY, RESIDUAL, DX, SUMS, WEIGHT, COUNT, INNER, x_outer, x_inner, r_outer, r_inner, dx_outer,
                  dx_inner, eps, ADD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """DX's rows <- the gradient at X's from DY [COUNT, D], and with ADD those of RESIDUAL; SUMS [programs, 2, D]: those
    at weight and bias of the program's rows. Grid (programs,)."""
    d = tl.arange(0, DP)[None, :]
    weight = tl.load(WEIGHT + d, mask=d < D, other=0.0)
    dweight = tl.zeros([DP], tl.float32)
    dbias = tl.zeros([DP], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(COUNT, ROWS), tl.num_programs(0)):
        i = block * ROWS + tl.arange(0, ROWS)[:, None]
        ok = (i < COUNT) & (d < D)
        x = tl.load(X + row_offsets(i, INNER, x_outer, x_inner) + d, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(DY + i.to(tl.int64) * D + d, mask=ok, other=0.0).to(tl.float32)
        h, factor = standardised(x, d < D, eps, D)
        dweight += tl.sum(g * h, 0)
        dbias += tl.sum(g, 0)
        g *= weight
        dx = factor * (g - tl.sum(g, 1)[:, None] / D - h * (tl.sum(g * h, 1)[:, None] / D))
        if ADD:
            dx += tl.load(RESIDUAL + row_offsets(i, INNER, r_outer, r_inner) + d, mask=ok, other=0.0).to(tl.float32)
        tl.store(DX + row_offsets(i, INNER, dx_outer, dx_inner) + d, dx.to(DX.dtype.element_ty), mask=ok)
    column = tl.arange(0, DP)
    sums = SUMS + tl.program_id(0) * (2 * D) + column
    tl.store(sums, dweight, mask=column < D)
    tl.store(sums + D, dbias, mask=column < D)


@torch.library.custom_op("hyena::norm", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """x [n, D] or [R, T, D], weight and bias [D] in float32 -> the same shape in `dtype`, contiguous, with `padding`
    columns more: a 1 and zeros."""
    x = _rows(x)
    y = torch.empty(*_padded(x, padding), dtype=dtype, device=x.device)
    count, inner, *strides = _places(x)
    sizes, options = _sizes(x.shape[-1])
    if count:
        with torch.cuda.device_of(x):
            norm_forward[(triton.cdiv(count, sizes["ROWS"]),)](x, y, weight.contiguous(), bias.contiguous(), count,
                                                               inner, *strides, eps, PADDING=padding, **sizes,
                                                               **options)
    return y


@torch.library.custom_op("hyena::norm_backward", mutates_args=("dx",))
def backward(x: Tensor, dy: Tensor, weight: Tensor, eps: float, dx: Tensor, residual: Tensor | None) -> Tensor:
    """Writes the gradient at x to dx, from dy at `forward`'s result, plus residual, all of x's shape (dy's rows may be
    [R T, D]); returns those at weight and bias, [2, D]."""
    x, dy = _rows(x), dy.contiguous()
    added = x if residual is None else _rows(residual)
    count, inner, *strides = _places(x)
    sizes, options = _sizes(x.shape[-1])
    programs = _programs(x)
    sums = torch.empty(programs, 2, x.shape[-1], dtype=torch.float32, device=x.device)
    if count:
        with torch.cuda.device_of(x):
            norm_backward[(programs,)](x, dy, added, dx, sums, weight.contiguous(), count, inner, *strides,
                                       *_places(added)[2:], *_places(dx)[2:], eps, ADD=residual is not None, **sizes,
                                       **options)
    return sums.sum(0)


forward.register_fake(lambda x, _weight, _bias, _eps, dtype, padding=0: x.new_empty(_padded(x, padding), dtype=dtype))
backward.register_fake(lambda _x, _dy, weight, *_: weight.new_empty(2, len(weight), dtype=torch.float32))
declare_cost("hyena::norm", lambda x, _weight, _bias, _eps, dtype, padding=0: Cost(
    x.nbytes + math.prod(_padded(x, padding)) * dtype.itemsize, 0, 1))
declare_cost("hyena::norm_backward", lambda x, dy, _weight, _eps, dx, residual: Cost(
    x.nbytes + dy.nbytes + dx.nbytes + (0 if residual is None else residual.nbytes)
    + 8 * _programs(x) * x.shape[-1], 0, 2))


def _programs(x: Tensor) -> int:
    return min(PROGRAMS, triton.cdiv(x.numel() // x.shape[-1], _sizes(x.shape[-1])[0]["ROWS"]))


def _padded(x: Tensor, padding: int) -> tuple[int, ...]:
    return *x.shape[:-1], x.shape[-1] + padding


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _places(x: Tensor) -> tuple[int, int, int, int]:
    """Rows in all, rows of an outer index, and the strides of both indices."""
    outer, inner, _ = x.shape if x.dim() == 3 else (1, *x.shape)
    return outer * inner, max(1, inner), x.stride(0) if x.dim() == 3 else 0, x.stride(-2)


def _sizes(channels: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch. One warp holds whole rows, so that no sum over a row needs a barrier."""
    padded = triton.next_power_of_2(max(32, channels))
    warps = max(1, padded // TILE)
    return {"D": channels, "DP": padded, "ROWS": max(1, warps * TILE // padded)}, {"num_warps": warps}
