"""Long rows, first and last step: N = N1 N2 points as columns [M, BC] of a matrix [N1, N2], M of N1 rows padded.

Between the steps stand A [B, c, 2, N1, N2], planes of real and imaginary parts: float32, or float16 with a power of two
for each tile of columns, COLUMN_SCALES [B, c, N2 / BC], from this side, for each row, ROW_SCALES [B, c, N1], from
`rows`. Where M > MB the result is made in blocks of MB rows. Grids (N2 / BC * M / MB, c, B).
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.pieces import load_planes, narrow, scaled, scaled_pair, table_times
from hyena_dist.ops.triton.short import taps


@triton.jit
def load_block(T, first, M: tl.constexpr, MB: tl.constexpr, TRANSPOSED: tl.constexpr, PREC: tl.constexpr):
    """Rows first .. first + MB - 1 of the [M, M] table, or of its transpose."""
    i, j = first + tl.arange(0, MB)[:, None], tl.arange(0, M)[None, :]
    return load_planes(T, (j * M + i) if TRANSPOSED else (i * M + j), M * M, PREC)


@triton.jit(do_not_specialize=["C", "c0", "N1"])
def columns(X, DY, A, COLUMN_SCALES, W, B, T1, TW, L, C, c0, N1, M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr,
            BC: tl.constexpr, K: tl.constexpr, WHAT: tl.constexpr, PREC: tl.constexpr):
    """A <- the columns' transforms, twiddled. WHAT: "u" = x1 v of X = p; "g" = dy x0; "h": rows of X [C, L]."""
    c, b, here = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row = c0 + c
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    F = load_block(T1, block * MB, M, MB, False, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = tl.arange(0, M)[:, None] * N2 + column
    k = block * MB + tl.arange(0, MB)[:, None]
    if WHAT == "h":
        u = tl.load(X + row.to(tl.int64) * L + n, mask=n < L, other=0.0).to(tl.float32)
    else:
        x0 = X + (b.to(tl.int64) * (3 * C) + row) * L
        CL = C.to(tl.int64) * L
        if WHAT == "u":
            u = taps(x0, CL, n, L, W, B, C + row, K) * taps(x0, 2 * CL, n, L, W, B, 2 * C + row, K)
        else:
            dy = tl.load(DY + (b.to(tl.int64) * C + row) * L + n, mask=n < L, other=0.0).to(tl.float32)
            u = dy * taps(x0, 0, n, L, W, B, row, K)
    u, s = scaled(u, 64.0)
    u = narrow(u, PREC)
    zero = tl.zeros([MB, BC], tl.float32)
    ar = table_times(F[0], F[-2], u, zero, PREC)
    ai = table_times(F[1], F[-1], u, zero, PREC)
    twr = tl.load(TW + k * N2 + column).to(tl.float32)
    twi = tl.load(TW + M * N2 + k * N2 + column).to(tl.float32)
    a_row = b.to(tl.int64) * here + c
    if PREC == "half":
        tl.store(COLUMN_SCALES + a_row * (N2 // BC) + tile, s)
    else:
        ar *= s
        ai *= s
    a = A + a_row * (2 * N1 * N2) + k * N2 + column
    tl.store(a, (ar * twr - ai * twi).to(A.dtype.element_ty), mask=k < N1)
    tl.store(a + N1 * N2, (ar * twi + ai * twr).to(A.dtype.element_ty), mask=k < N1)


@triton.jit
def from_columns(A, ROW_SCALES, a_row, F, TW, column, N1, M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr,
                 BC: tl.constexpr, PREC: tl.constexpr):
    """[MB, BC] float32: the inverse of the twisted transform of the columns of one row of A, its real part."""
    k = tl.arange(0, M)[:, None]
    a = A + a_row * (2 * N1 * N2) + k * N2 + column
    zr = tl.load(a, mask=k < N1, other=0.0).to(tl.float32)
    zi = tl.load(a + N1 * N2, mask=k < N1, other=0.0).to(tl.float32)
    twr = tl.load(TW + k * N2 + column).to(tl.float32)
    twi = tl.load(TW + M * N2 + k * N2 + column).to(tl.float32)
    if PREC == "half":
        f = tl.load(ROW_SCALES + a_row * N1 + k, mask=k < N1, other=0.0)
        twr *= f
        twi *= f
    ar, ai, s = scaled_pair(zr * twr + zi * twi, zi * twr - zr * twi, 64.0)
    zero = tl.zeros([MB, BC], tl.float32)
    y = table_times(F[0], F[-2], narrow(ar, PREC), zero, PREC)
    return table_times(F[1], F[-1], narrow(ai, PREC), y, PREC) * s


@triton.jit(do_not_specialize=["C", "c0", "N1"])
def leave(A, ROW_SCALES, P, Y, W, B, BIAS, T1, TW, L, C, c0, N1, M: tl.constexpr, MB: tl.constexpr,
          N2: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, PREC: tl.constexpr):
    """Y [B, C, L] <- x0 (h (*) u + bias u), from the rows' inverse transforms A."""
    c, b = tl.program_id(1), tl.program_id(2)
    row = c0 + c
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    a_row = b.to(tl.int64) * tl.num_programs(1) + c
    y = from_columns(A, ROW_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC)
    x0 = P + (b.to(tl.int64) * (3 * C) + row) * L
    CL = C.to(tl.int64) * L
    u = taps(x0, CL, n, L, W, B, C + row, K) * taps(x0, 2 * CL, n, L, W, B, 2 * C + row, K)
    y = (y + tl.load(BIAS + row).to(tl.float32) * u) * taps(x0, 0, n, L, W, B, row, K)
    tl.store(Y + (b.to(tl.int64) * C + row) * L + n, y.to(Y.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["C", "c0", "N1"])
def leave_backward(A, G, ROW_SCALES, G_SCALES, P, DY, DQ, SUMS, W, B, BIAS, T1, TW, L, C, c0, N1,
                   M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr, BC: tl.constexpr, K: tl.constexpr,
                   PREC: tl.constexpr):
    """From the rows' inverse transforms of the convolution, A, and of the gradient at u, G: DQ [B, 3, c, L], gradients
    at q; SUMS [B, c, programs], the program's part of the bias' gradient; y takes the place of DY [B, C, L]."""
    c, b, here = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row = c0 + c
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    a_row = b.to(tl.int64) * here + c
    bias = tl.load(BIAS + row).to(tl.float32)
    x0_row = P + (b.to(tl.int64) * (3 * C) + row) * L
    CL = C.to(tl.int64) * L
    dq = DQ + (b.to(tl.int64) * (3 * here) + c) * L + n
    dy_at = DY + (b.to(tl.int64) * C + row) * L + n
    part = here.to(tl.int64) * L
    conv = from_columns(A, ROW_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC)
    x1 = taps(x0_row, CL, n, L, W, B, C + row, K)
    v = taps(x0_row, 2 * CL, n, L, W, B, 2 * C + row, K)
    x0 = taps(x0_row, 0, n, L, W, B, row, K)
    dy = tl.load(dy_at, mask=n < L, other=0.0).to(tl.float32)
    tl.debug_barrier()  # dy was read before y takes its place
    conv += bias * (x1 * v)
    tl.store(dq, (conv * dy).to(DQ.dtype.element_ty), mask=n < L)
    tl.store(dy_at, (conv * x0).to(DY.dtype.element_ty), mask=n < L)
    g = dy * x0
    total = tl.sum(tl.sum(g * (x1 * v), axis=0), axis=0)
    tl.store(SUMS + a_row * tl.num_programs(0) + tl.program_id(0), total)
    du = from_columns(G, G_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC) + bias * g
    tl.store(dq + part, (du * v).to(DQ.dtype.element_ty), mask=n < L)
    tl.store(dq + 2 * part, (du * x1).to(DQ.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["c0", "N1"])
def leave_filters(A, ROW_SCALES, OUT, T1, TW, L, c0, N1, scale, M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr,
                  BC: tl.constexpr, PREC: tl.constexpr):
    """OUT [C, L] from c0 on <- the inverse of A [c, 2, N1, N2]. Grid (N2 / BC * M / MB, c)."""
    c = tl.program_id(1)
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    y = from_columns(A, ROW_SCALES, c.to(tl.int64), F, TW, column, N1, M, MB, N2, BC, PREC) * scale
    tl.store(OUT + (c0 + c).to(tl.int64) * L + n, y.to(OUT.dtype.element_ty), mask=n < L)
