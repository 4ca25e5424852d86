"""Long rows, first and last step: N = N1 N2 points as columns [M, BC] of a matrix [N1, N2], M of N1 rows padded.

Between the steps stand A [rows, c, 2, N1, N2], planes of real and imaginary parts: float32, or float16 with a power of
two for each tile of columns, COLUMN_SCALES [rows, c, N2 / BC], from this side, for each row, ROW_SCALES [rows, c, N1],
from `rows`. Where M > MB the result is made in blocks of MB rows. Grids (N2 / BC * M / MB, c, rows).
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.given import entering, factor, gated, place_of, token
from hyena_dist.ops.triton.pieces import load_planes, narrow, scaled, scaled_pair, table_times


@triton.jit
def load_block(T, first, M: tl.constexpr, MB: tl.constexpr, TRANSPOSED: tl.constexpr, PREC: tl.constexpr):
    """Rows first .. first + MB - 1 of the [M, M] table, or of its transpose."""
    i, j = first + tl.arange(0, MB)[:, None], tl.arange(0, M)[None, :]
    return load_planes(T, (j * M + i) if TRANSPOSED else (i * M + j), M * M, PREC)


@triton.jit(do_not_specialize=["C", "c0", "N1"])
def columns(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, A, COLUMN_SCALES, T1, TW, N1,
            M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr, BC: tl.constexpr, GATE: tl.constexpr,
            BLOCKS: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr, PREC: tl.constexpr):
    """A <- the columns' transforms, twiddled, of what is given: u, filters, or the result's gradient and its gate."""
    c, r, here = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p, x = P + (b * p_b + c.to(tl.int64) * p_c + start), X + (b * x_b + c.to(tl.int64) * x_c)
    F = load_block(T1, block * MB, M, MB, False, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = tl.arange(0, M)[:, None] * N2 + column
    k = block * MB + tl.arange(0, MB)[:, None]
    x += token(n, start, l, x_slice, SLICES)
    u = entering(p, x, p_block, n, size, W, B, c0 + c, C, GATE, BLOCKS, K)
    u, s = scaled(u, 64.0)
    u = narrow(u, PREC)
    zero = tl.zeros([MB, BC], tl.float32)
    ar = table_times(F[0], F[-2], u, zero, PREC)
    ai = table_times(F[1], F[-1], u, zero, PREC)
    twr = tl.load(TW + k * N2 + column).to(tl.float32)
    twi = tl.load(TW + M * N2 + k * N2 + column).to(tl.float32)
    a_row = r.to(tl.int64) * here + c
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
def leave(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, A, ROW_SCALES, Y, y_b, y_c, y_slice,
          BIAS, T1, TW, N1, M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr, BC: tl.constexpr, GATE: tl.constexpr,
          BLOCKS: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr, PREC: tl.constexpr):
    """Y [B, c, L] <- gate (h (*) u + bias u) of what is given, from the rows' inverse transforms A."""
    c, r = tl.program_id(1), tl.program_id(2)
    row = c0 + c
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p, x = P + (b * p_b + c.to(tl.int64) * p_c + start), X + (b * x_b + c.to(tl.int64) * x_c)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    a_row = r.to(tl.int64) * tl.num_programs(1) + c
    y = from_columns(A, ROW_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC)
    x += token(n, start, l, x_slice, SLICES)
    y += tl.load(BIAS + row).to(tl.float32) * entering(p, x, p_block, n, size, W, B, row, C, -1, BLOCKS, K)
    y = gated(y, p, p_block, n, size, W, B, row, C, GATE, K)
    out = Y + (b * y_b + c.to(tl.int64) * y_c) + token(n, start, l, y_slice, SLICES)
    tl.store(out, y.to(Y.dtype.element_ty), mask=n < size)


@triton.jit(do_not_specialize=["C", "c0", "N1"])
def leave_backward(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, A, G, ROW_SCALES, G_SCALES,
                   DY, y_b, y_c, y_slice, DQ, q_b, q_block, q_c, DX, SUMS, BIAS, T1, TW, N1, M: tl.constexpr,
                   MB: tl.constexpr, N2: tl.constexpr, BC: tl.constexpr, GATE: tl.constexpr, BLOCKS: tl.constexpr,
                   K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr, PREC: tl.constexpr):
    """From the rows' inverse transforms of the convolution, A, and of the gradient at u, G: DQ [B, blocks, c, L],
    gradients at the gate and at u's factors, or DX [B, c, L], of X's strides, that at u; SUMS [rows, c, programs], the
    program's part of the bias' gradient; y takes the place of DY [B, c, L]."""
    c, r, here = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row = c0 + c
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p = P + (b * p_b + c.to(tl.int64) * p_c + start)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    ok = n < size
    x_place = b * x_b + c.to(tl.int64) * x_c + token(n, start, l, x_slice, SLICES)
    a_row = r.to(tl.int64) * here + c
    bias = tl.load(BIAS + row).to(tl.float32)
    dq = DQ + (b * q_b + c.to(tl.int64) * q_c + start) + n
    dy_at = DY + (b * y_b + c.to(tl.int64) * y_c) + token(n, start, l, y_slice, SLICES)
    conv = from_columns(A, ROW_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC)
    if BLOCKS > 0:
        x1 = factor(p, BLOCKS - 2, p_block, n, size, W, B, row, C, K)
        v = factor(p, BLOCKS - 1, p_block, n, size, W, B, row, C, K)
        u = x1 * v
    else:
        u = entering(p, X + x_place, p_block, n, size, W, B, row, C, -1, BLOCKS, K)
    g = tl.load(dy_at, mask=ok, other=0.0).to(tl.float32)
    conv += bias * u
    tl.debug_barrier()  # dy was read before y takes its place
    if GATE >= 0:
        gate = factor(p, GATE, p_block, n, size, W, B, row, C, K)
        tl.store(dq + tl.cast(q_block, tl.int64) * GATE, (conv * g).to(DQ.dtype.element_ty), mask=ok)
        g *= gate
        conv *= gate
    tl.store(dy_at, conv.to(DY.dtype.element_ty), mask=ok)
    total = tl.sum(tl.sum(g * u, axis=0), axis=0)
    tl.store(SUMS + a_row * tl.num_programs(0) + tl.program_id(0), total)
    du = from_columns(G, G_SCALES, a_row, F, TW, column, N1, M, MB, N2, BC, PREC) + bias * g
    if BLOCKS > 0:
        tl.store(dq + tl.cast(q_block, tl.int64) * (BLOCKS - 2), (du * v).to(DQ.dtype.element_ty), mask=ok)
        tl.store(dq + tl.cast(q_block, tl.int64) * (BLOCKS - 1), (du * x1).to(DQ.dtype.element_ty), mask=ok)
    else:
        tl.store(DX + x_place, du.to(DX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N1"])
def leave_filters(A, ROW_SCALES, OUT, T1, TW, L, out_c, N1, scale, M: tl.constexpr, MB: tl.constexpr, N2: tl.constexpr,
                  BC: tl.constexpr, PREC: tl.constexpr):
    """The first L lags of OUT [c, at least L] <- the inverse of A [c, 2, N1, N2]. Grid (N2 / BC * M / MB, c)."""
    c = tl.program_id(1)
    block, tile = tl.program_id(0) % (M // MB), tl.program_id(0) // (M // MB)
    F = load_block(T1, block * MB, M, MB, True, PREC)
    column = tile * BC + tl.arange(0, BC)[None, :]
    n = (block * MB + tl.arange(0, MB)[:, None]) * N2 + column
    y = from_columns(A, ROW_SCALES, c.to(tl.int64), F, TW, column, N1, M, MB, N2, BC, PREC) * scale
    tl.store(OUT + c.to(tl.int64) * out_c + n, y.to(OUT.dtype.element_ty), mask=n < L)
