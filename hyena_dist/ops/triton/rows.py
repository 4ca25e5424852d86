"""Long rows, middle step: the rows of A [B, c, 2, N1, N2] (`columns`), each as a tile [R1, R2] with N2 = R1 R2.

H [c, 2, N1, N2] is the filters' spectrum, each row divided by HS [c, N1]. Grids (N1, c, splits); a program goes through
the batch's rows split, split + splits, ... ZERO is 0, as in `small`.
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.pieces import (
    add_correlation,
    left,
    left_adjoint,
    load_table,
    multiply,
    multiply_conjugate,
    narrow,
    right,
    right_conjugate,
    scaled_pair,
    spectrum_scale,
)


@triton.jit
def load_row(A, COLUMN_SCALES, a_row, k, at, N1, R1: tl.constexpr, R2: tl.constexpr, BC: tl.constexpr,
             ROOM: tl.constexpr, PREC: tl.constexpr):
    """Row k of one row of A as a tile with its largest part in [ROOM, 2 ROOM), and its scale."""
    N2: tl.constexpr = R1 * R2
    a = A + a_row * (2 * N1 * N2) + k * N2 + at
    ar, ai = tl.load(a).to(tl.float32), tl.load(a + N1 * N2).to(tl.float32)
    if PREC == "half":
        f = tl.load(COLUMN_SCALES + a_row * (N2 // BC) + tl.arange(0, R1)[:, None] // (BC // R2))
        ar *= f
        ai *= f
    ar, ai, s = scaled_pair(ar, ai, ROOM)
    return narrow(ar, PREC), narrow(ai, PREC), s


@triton.jit
def store_row(A, ROW_SCALES, yr, yi, s, a_row, k, at, N1, N2: tl.constexpr, PREC: tl.constexpr):
    if PREC == "half":
        yr, yi, t = scaled_pair(yr, yi, 64.0)
        tl.store(ROW_SCALES + a_row * N1 + k, s * t)
    else:
        yr *= s
        yi *= s
    a = A + a_row * (2 * N1 * N2) + k * N2 + at
    tl.store(a, yr.to(A.dtype.element_ty))
    tl.store(a + N1 * N2, yi.to(A.dtype.element_ty))


@triton.jit
def row_forward(ar, ai, F1, F2, TW, at, PLANE: tl.constexpr, PREC: tl.constexpr):
    zr, zi = left(ar, ai, F1, PREC)
    br, bi = multiply(zr, zi, tl.load(TW + at), tl.load(TW + PLANE + at))
    return right(br, bi, F2, PREC)


@triton.jit
def row_inverse(pr, pi, F1, F2, TW, at, PLANE: tl.constexpr, PREC: tl.constexpr):
    br, bi = right_conjugate(pr, pi, F2, PREC)
    ar, ai = multiply_conjugate(br, bi, tl.load(TW + at), tl.load(TW + PLANE + at))
    return left_adjoint(ar, ai, F1, PREC)


@triton.jit(do_not_specialize=["batch", "N1"])
def forward(A, COLUMN_SCALES, ROW_SCALES, H, HS, T1, T2, TW, batch, N1, ZERO, R1: tl.constexpr, R2: tl.constexpr,
            BC: tl.constexpr, ROOM: tl.constexpr, PREC: tl.constexpr):
    """A <- inverse(H forward(A)), row by row."""
    PLANE: tl.constexpr = R1 * R2
    k, c, here = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    F1 = load_table(T1, R1, PREC)
    F2 = load_table(T2, R2, PREC)
    at = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    hs = tl.load(HS + c * N1 + k)
    h_real = H + c.to(tl.int64) * (2 * N1 * PLANE) + k * PLANE
    h_imaginary = h_real + N1 * PLANE
    for i in range(tl.program_id(2), batch, tl.num_programs(2)):
        b = c * 0 + i  # in the interpreter the loop's variable is an int of Python
        a_row = b.to(tl.int64) * here + c
        again = at + (b + 1) * ZERO
        ar, ai, s = load_row(A, COLUMN_SCALES, a_row, k, at, N1, R1, R2, BC, ROOM, PREC)
        zr, zi = row_forward(ar, ai, F1, F2, TW, at, PLANE, PREC)
        pr, pi = multiply(zr, zi, tl.load(h_real + again), tl.load(h_imaginary + again))
        yr, yi = row_inverse(pr, pi, F1, F2, TW, again, PLANE, PREC)
        tl.debug_barrier()  # the row was read before its result takes its place
        store_row(A, ROW_SCALES, yr, yi, s * hs, a_row, k, again, N1, PLANE, PREC)


@triton.jit(do_not_specialize=["batch", "N1"])
def backward(A, G, COLUMN_SCALES, G_COLUMN_SCALES, ROW_SCALES, G_ROW_SCALES, F, F_SCALES, DH, H, HS, T1, T2, TW, batch,
             N1, ZERO, ALONE: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BC: tl.constexpr, ROOM: tl.constexpr,
             PREC: tl.constexpr):
    """A <- inverse(H U) with U = forward(A); G <- inverse(conj(H) forward(G)). The gradient at the filters' spectra
    is the sum over the batch of conj(U) forward(G). ALONE, a batch of one row: its inverse goes to F [c, 2, N1, N2] and
    F_SCALES [c, N1] at once; else it goes to DH [c, 2, N1, N2] in float32, and `inverse_of_filters` comes next: in this
    kernel it would spill. Spectra that are needed again wait in the places of A and G that they came from.
    Grid (N1, c)."""
    PLANE: tl.constexpr = R1 * R2
    k, c, here = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    F1 = load_table(T1, R1, PREC)
    F2 = load_table(T2, R2, PREC)
    at = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    hs = tl.load(HS + c * N1 + k)
    offset = c.to(tl.int64) * (2 * N1 * PLANE) + k * PLANE
    plane = N1 * PLANE
    for i in range(batch):
        b = c * 0 + i
        a_row = b.to(tl.int64) * here + c
        u_place = A + a_row * (2 * plane) + k * PLANE
        g_place = G + a_row * (2 * plane) + k * PLANE
        m = at + b * ZERO
        ar, ai, s = load_row(A, COLUMN_SCALES, a_row, k, m, N1, R1, R2, BC, ROOM, PREC)
        ur, ui = row_forward(ar, ai, F1, F2, TW, m, PLANE, PREC)
        tl.debug_barrier()  # the row was read before its spectrum takes its place
        store_pair(u_place, plane, m, ur, ui)
        m = at + (b + 1) * ZERO
        ar, ai, t = load_row(G, G_COLUMN_SCALES, a_row, k, m, N1, R1, R2, BC, ROOM, PREC)
        gr, gi = row_forward(ar, ai, F1, F2, TW, m, PLANE, PREC)
        tl.debug_barrier()  # what other threads wrote is read below, and the row was read before its place is taken
        if ALONE:
            store_pair(g_place, plane, m, gr, gi)
            ur, ui = tl.load(u_place + m).to(tl.float32), tl.load(u_place + plane + m).to(tl.float32)
            dr, di = multiply_conjugate(gr.to(tl.float32), gi.to(tl.float32), ur, ui)
            store_inverse(F, F_SCALES, dr, di, s * t, F1, F2, TW, c, k, m, N1, PLANE, ROOM, PREC)
            m = at + (b + 2) * ZERO
            tl.debug_barrier()  # read by other threads than those that wrote it
            gr, gi = tl.load(g_place + m), tl.load(g_place + plane + m)
        else:
            add_correlation(DH + offset, u_place, plane, m, b == 0, gr, gi, s * t)
        pr, pi = multiply_conjugate(gr, gi, tl.load(H + offset + m), tl.load(H + offset + plane + m))
        m = at + (b + 3) * ZERO
        yr, yi = row_inverse(pr, pi, F1, F2, TW, m, PLANE, PREC)
        tl.debug_barrier()  # the row's spectrum was read before its result takes its place
        store_row(G, G_ROW_SCALES, yr, yi, t * hs, a_row, k, m, N1, PLANE, PREC)
        m = at + (b + 4) * ZERO
        pr, pi = multiply(tl.load(u_place + m), tl.load(u_place + plane + m), tl.load(H + offset + m),
                          tl.load(H + offset + plane + m))
        m = at + (b + 5) * ZERO
        yr, yi = row_inverse(pr, pi, F1, F2, TW, m, PLANE, PREC)
        tl.debug_barrier()  # the row's spectrum was read; the next row's loads of DH are by other threads than these
        store_row(A, ROW_SCALES, yr, yi, s * hs, a_row, k, m, N1, PLANE, PREC)


@triton.jit
def store_pair(place, plane, at, re, im):
    """A spectrum that waits in a row's place."""
    tl.store(place + at, re)
    tl.store(place + plane + at, im)


@triton.jit
def store_inverse(F, F_SCALES, dr, di, scale, F1, F2, TW, c, k, at, N1, PLANE: tl.constexpr,
                  ROOM: tl.constexpr, PREC: tl.constexpr):
    """Row k of channel c of F <- the inverse of (dr + i di) scale."""
    pr, pi, s = scaled_pair(dr, di, ROOM)
    yr, yi = row_inverse(narrow(pr, PREC), narrow(pi, PREC), F1, F2, TW, at, PLANE, PREC)
    store_row(F, F_SCALES, yr, yi, s * scale, c.to(tl.int64), k, at, N1, PLANE, PREC)


@triton.jit(do_not_specialize=["N1"])
def spectrum(A, COLUMN_SCALES, H, HS, T1, T2, TW, N1, scale, R1: tl.constexpr, R2: tl.constexpr, BC: tl.constexpr,
             ROOM: tl.constexpr, PREC: tl.constexpr):
    """H, HS <- of the filters' columns A [c, 2, N1, N2]; `scale` goes into HS. Grid (N1, c)."""
    PLANE: tl.constexpr = R1 * R2
    k, c = tl.program_id(0), tl.program_id(1)
    F1 = load_table(T1, R1, PREC)
    F2 = load_table(T2, R2, PREC)
    at = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    ar, ai, s = load_row(A, COLUMN_SCALES, c.to(tl.int64), k, at, N1, R1, R2, BC, ROOM, PREC)
    zr, zi = row_forward(ar, ai, F1, F2, TW, at, PLANE, PREC)
    zr, zi = zr.to(tl.float32), zi.to(tl.float32)
    inverse, t = spectrum_scale(zr, zi, R2)
    tl.store(HS + c * N1 + k, s * t * scale)
    h = H + c.to(tl.int64) * (2 * N1 * PLANE) + k * PLANE + at
    tl.store(h, (zr * inverse).to(H.dtype.element_ty))
    tl.store(h + N1 * PLANE, (zi * inverse).to(H.dtype.element_ty))


@triton.jit(do_not_specialize=["N1"])
def inverse_of_filters(DH, F, F_SCALES, T1, T2, TW, N1, R1: tl.constexpr, R2: tl.constexpr, ROOM: tl.constexpr,
                       PREC: tl.constexpr):
    """F, F_SCALES <- the inverse of DH, row by row, both [c, 2, N1, N2]. Grid (N1, c)."""
    PLANE: tl.constexpr = R1 * R2
    k, c = tl.program_id(0), tl.program_id(1)
    F1 = load_table(T1, R1, PREC)
    F2 = load_table(T2, R2, PREC)
    at = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    row = DH + c.to(tl.int64) * (2 * N1 * PLANE) + k * PLANE + at
    dr, di = tl.load(row), tl.load(row + N1 * PLANE)
    store_inverse(F, F_SCALES, dr, di, 1.0, F1, F2, TW, c, k, at, N1, PLANE, ROOM, PREC)
