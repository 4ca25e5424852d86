"""The convolution of up to 8,192 points in one kernel for each direction: a row [M, N2] in registers and shared memory.

H [c, 2, M, N2] is the filters' spectrum, divided by HS [c]. Grids (c, splits); a program goes through the batch's rows
split, split + splits, ...

What is read again later comes from a place that the compiler cannot prove equal (ZERO is 0 at run time), so that it
does not live through all products in registers.
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.given import entering, gated, place_of, store_gradient, token
from hyena_dist.ops.triton.pieces import (
    add_correlation,
    forward_real,
    inverse_real,
    load_table,
    multiply,
    multiply_conjugate,
    narrow,
    scaled,
    scaled_pair,
    spectrum_scale,
)


@triton.jit
def spectrum(X, H, HS, T1, T2, TW, L, x_c, scale, M: tl.constexpr, N2: tl.constexpr, ROOM: tl.constexpr,
             PREC: tl.constexpr):
    """H <- of the first L lags of the filters X [c, at least L]; HS <- their powers of two times `scale`. Grid (c,)."""
    PLANE: tl.constexpr = M * N2
    c = tl.program_id(0)
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    x = tl.load(X + c.to(tl.int64) * x_c + n, mask=n < L, other=0.0).to(tl.float32)
    x, s = scaled(x, ROOM)
    zr, zi = forward_real(narrow(x, PREC), F1, F2, TW, n, PLANE, PREC)
    zr, zi = zr.to(tl.float32), zi.to(tl.float32)
    inverse, t = spectrum_scale(zr, zi, N2)
    h = H + c.to(tl.int64) * (2 * PLANE) + n
    tl.store(HS + c, s * t * scale)
    tl.store(h, (zr * inverse).to(H.dtype.element_ty))
    tl.store(h + PLANE, (zi * inverse).to(H.dtype.element_ty))


@triton.jit(do_not_specialize=["splits"])
def filter_gradient(DH, OUT, T1, T2, TW, L, out_c, splits, scale, M: tl.constexpr, N2: tl.constexpr, ROOM: tl.constexpr,
                    PREC: tl.constexpr):
    """The first L lags of OUT [c, at least L] <- the inverse of the sum over the splits of DH [splits, c, 2, M, N2].
    Grid (c,)."""
    PLANE: tl.constexpr = M * N2
    c, channels = tl.program_id(0), tl.num_programs(0)
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    zr = tl.zeros([M, N2], tl.float32)
    zi = tl.zeros([M, N2], tl.float32)
    for i in range(splits):
        d = DH + ((c * 0 + i).to(tl.int64) * channels + c) * (2 * PLANE) + n
        zr += tl.load(d)
        zi += tl.load(d + PLANE)
    zr, zi, s = scaled_pair(zr, zi, ROOM)
    y = inverse_real(narrow(zr, PREC), narrow(zi, PREC), F1, F2, TW, n, PLANE, PREC)
    tl.store(OUT + c.to(tl.int64) * out_c + n, (y * (s * scale)).to(OUT.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["rows", "C", "c0"])
def forward(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, Y, y_b, y_c, y_slice, H, HS, BIAS,
            T1, T2, TW, rows, ZERO, M: tl.constexpr, N2: tl.constexpr, GATE: tl.constexpr, BLOCKS: tl.constexpr,
            K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, PREC: tl.constexpr):
    """Y [B, c, L] <- gate (h (*) u + bias u) of what is given."""
    PLANE: tl.constexpr = M * N2
    c = tl.program_id(0)
    row = c0 + c
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    bias = tl.load(BIAS + row).to(tl.float32)
    hs = tl.load(HS + c)
    h = H + c.to(tl.int64) * (2 * PLANE)
    for i in range(tl.program_id(1), rows, tl.num_programs(1)):
        r = c * 0 + i  # in the interpreter the loop's variable is an int of Python
        b, start, size = place_of(PLACES, r, L, SEGMENTS)
        p, x = P + (b * p_b + c.to(tl.int64) * p_c + start), X + (b * x_b + c.to(tl.int64) * x_c)
        first, again = n + r * ZERO, n + (r + 1) * ZERO
        x += token(first, start, l, x_slice, SLICES)
        u = entering(p, x, p_block, first, size, W, B, row, C, -1, BLOCKS, K)
        u, s = scaled(u, ROOM)
        u = narrow(u, PREC)
        zr, zi = forward_real(u, F1, F2, TW, first, PLANE, PREC)
        pr, pi = multiply(zr, zi, tl.load(h + first), tl.load(h + PLANE + first))
        y = inverse_real(pr, pi, F1, F2, TW, again, PLANE, PREC) * (s * hs) + u.to(tl.float32) * (bias * s)
        y = gated(y, p, p_block, again, size, W, B, row, C, GATE, K)
        out = Y + (b * y_b + c.to(tl.int64) * y_c) + token(again, start, l, y_slice, SLICES)
        tl.store(out, y.to(Y.dtype.element_ty), mask=again < size)


@triton.jit(do_not_specialize=["rows", "C", "c0"])
def backward(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, DY, y_b, y_c, y_slice, DQ, q_b,
             q_block, q_c, DX, U, DH, SUMS, H, HS, BIAS, T1, T2, TW, rows, ZERO, M: tl.constexpr, N2: tl.constexpr,
             GATE: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr,
             ROOM: tl.constexpr, PREC: tl.constexpr):
    """DQ [B, blocks, c, L] <- gradients at the gate and at u's factors, or DX [B, c, L], of X's strides, <- that at u;
    DH [splits, c, 2, M, N2] <- the sum over the program's rows of conj(U) G; SUMS [splits, c] <- that of the bias'
    gradient; y takes the place of DY [B, c, L]. U [splits, c, 2, M, N2] is a place for the spectrum of u."""
    PLANE: tl.constexpr = M * N2
    c, here = tl.program_id(0), tl.num_programs(0)
    row = c0 + c
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    bias = tl.load(BIAS + row).to(tl.float32)
    hs = tl.load(HS + c)
    h = H + c.to(tl.int64) * (2 * PLANE)
    slot = (tl.program_id(1) * here + c).to(tl.int64) * (2 * PLANE)
    spectrum_u, dh = U + slot, DH + slot
    total = 0.0
    for i in range(tl.program_id(1), rows, tl.num_programs(1)):
        r = c * 0 + i
        b, start, size = place_of(PLACES, r, L, SEGMENTS)
        x_place = b * x_b + c.to(tl.int64) * x_c
        p, x, dx = P + (b * p_b + c.to(tl.int64) * p_c + start), X + x_place, DX + x_place
        dy_row = DY + (b * y_b + c.to(tl.int64) * y_c)
        dq = DQ + (b * q_b + c.to(tl.int64) * q_c + start)
        m = n + r * ZERO
        u = entering(p, x + token(m, start, l, x_slice, SLICES), p_block, m, size, W, B, row, C, -1, BLOCKS, K)
        u, s = scaled(u, ROOM)
        ur, ui = forward_real(narrow(u, PREC), F1, F2, TW, m, PLANE, PREC)
        tl.store(spectrum_u + m, ur)
        tl.store(spectrum_u + PLANE + m, ui)
        tl.debug_barrier()  # read below by other threads: loads and stores are laid out differently
        m = n + (r + 1) * ZERO
        at = token(m, start, l, y_slice, SLICES)
        g = tl.load(dy_row + at, mask=m < size, other=0.0).to(tl.float32)
        g, t = scaled(gated(g, p, p_block, m, size, W, B, row, C, GATE, K), ROOM)
        g = narrow(g, PREC)
        gr, gi = forward_real(g, F1, F2, TW, m, PLANE, PREC)
        add_correlation(dh, spectrum_u, PLANE, m, r < tl.num_programs(1), gr, gi, s * t)
        pr, pi = multiply_conjugate(gr, gi, tl.load(h + m), tl.load(h + PLANE + m))
        m = n + (r + 2) * ZERO
        du, g = inverse_real(pr, pi, F1, F2, TW, m, PLANE, PREC) * (t * hs), g.to(tl.float32) * t
        at = token(m, start, l, x_slice, SLICES)
        total += tl.sum(tl.sum(g * entering(p, x + at, p_block, m, size, W, B, row, C, -1, BLOCKS, K), axis=0), axis=0)
        store_gradient(du + bias * g, p, dq, dx + at, p_block, q_block, m, size, W, B, row, C, BLOCKS, K)
        m = n + (r + 3) * ZERO
        pr, pi = multiply(tl.load(spectrum_u + m), tl.load(spectrum_u + PLANE + m), tl.load(h + m),
                          tl.load(h + PLANE + m))
        conv = inverse_real(pr, pi, F1, F2, TW, m, PLANE, PREC) * (s * hs)
        x += token(m, start, l, x_slice, SLICES)
        conv += bias * entering(p, x, p_block, m, size, W, B, row, C, -1, BLOCKS, K)
        y = gated(conv, p, p_block, m, size, W, B, row, C, GATE, K)
        at = token(m, start, l, y_slice, SLICES)
        if GATE >= 0:
            dgate = conv * tl.load(dy_row + at, mask=m < size, other=0.0).to(tl.float32)
            tl.store(dq + tl.cast(q_block, tl.int64) * GATE + m, dgate.to(DQ.dtype.element_ty), mask=m < size)
        tl.debug_barrier()  # dy was read before y takes its place, and this row's U before the next one's
        tl.store(dy_row + at, y.to(DY.dtype.element_ty), mask=m < size)
    tl.store(SUMS + tl.program_id(1) * here + c, total)
