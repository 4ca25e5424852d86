"""The convolution of up to 8,192 points in one kernel for each direction: a row [M, N2] in registers and shared memory.

H [c, 2, M, N2] is the filters' spectrum, divided by HS [c]. Grids (c, splits); a program goes through the batch's rows
split, split + splits, ...

What is read again later comes from a place that the compiler cannot prove equal (ZERO is 0 at run time), so that it
does not live through all products in registers.
"""

import triton
import triton.language as tl

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
from hyena_dist.ops.triton.short import taps


@triton.jit(do_not_specialize=["c0"])
def spectrum(X, H, HS, T1, T2, TW, L, c0, scale, M: tl.constexpr, N2: tl.constexpr, ROOM: tl.constexpr,
             PREC: tl.constexpr):
    """H <- of the filters X [C, L] from c0 on; HS <- their powers of two times `scale`. Grid (c,)."""
    PLANE: tl.constexpr = M * N2
    c = tl.program_id(0)
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    x = tl.load(X + (c0 + c).to(tl.int64) * L + n, mask=n < L, other=0.0).to(tl.float32)
    x, s = scaled(x, ROOM)
    zr, zi = forward_real(narrow(x, PREC), F1, F2, TW, n, PLANE, PREC)
    zr, zi = zr.to(tl.float32), zi.to(tl.float32)
    inverse, t = spectrum_scale(zr, zi, N2)
    h = H + c.to(tl.int64) * (2 * PLANE) + n
    tl.store(HS + c, s * t * scale)
    tl.store(h, (zr * inverse).to(H.dtype.element_ty))
    tl.store(h + PLANE, (zi * inverse).to(H.dtype.element_ty))


@triton.jit(do_not_specialize=["c0", "splits"])
def filter_gradient(DH, OUT, T1, T2, TW, L, c0, splits, scale, M: tl.constexpr, N2: tl.constexpr, ROOM: tl.constexpr,
                    PREC: tl.constexpr):
    """OUT [C, L] from c0 on <- the inverse of the sum over the splits of DH [splits, c, 2, M, N2]. Grid (c,)."""
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
    tl.store(OUT + (c0 + c).to(tl.int64) * L + n, (y * (s * scale)).to(OUT.dtype.element_ty), mask=n < L)


@triton.jit(do_not_specialize=["batch", "C", "c0"])
def forward(P, Y, W, B, H, HS, BIAS, T1, T2, TW, L, batch, C, c0, ZERO, M: tl.constexpr, N2: tl.constexpr,
            K: tl.constexpr, ROOM: tl.constexpr, PREC: tl.constexpr):
    """P [B, 3, C, L] -> Y [B, C, L] = x0 (h (*) u + bias u)."""
    PLANE: tl.constexpr = M * N2
    c = tl.program_id(0)
    row = c0 + c
    F1 = load_table(T1, M, PREC)
    F2 = load_table(T2, N2, PREC)
    n = tl.arange(0, M)[:, None] * N2 + tl.arange(0, N2)[None, :]
    bias = tl.load(BIAS + row).to(tl.float32)
    hs = tl.load(HS + c)
    h = H + c.to(tl.int64) * (2 * PLANE)
    CL = C.to(tl.int64) * L
    for i in range(tl.program_id(1), batch, tl.num_programs(1)):
        b = c * 0 + i  # in the interpreter the loop's variable is an int of Python
        x0 = P + (b.to(tl.int64) * (3 * C) + row) * L
        first, again = n + b * ZERO, n + (b + 1) * ZERO
        u = taps(x0, CL, first, L, W, B, C + row, K) * taps(x0, 2 * CL, first, L, W, B, 2 * C + row, K)
        u, s = scaled(u, ROOM)
        u = narrow(u, PREC)
        zr, zi = forward_real(u, F1, F2, TW, first, PLANE, PREC)
        pr, pi = multiply(zr, zi, tl.load(h + first), tl.load(h + PLANE + first))
        y = inverse_real(pr, pi, F1, F2, TW, again, PLANE, PREC) * (s * hs) + u.to(tl.float32) * (bias * s)
        ok = again < L
        y *= taps(x0, 0, again, L, W, B, row, K)
        tl.store(Y + (b.to(tl.int64) * C + row) * L + again, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["batch", "C", "c0"])
def backward(P, DY, DQ, U, DH, SUMS, W, B, H, HS, BIAS, T1, T2, TW, L, batch, C, c0, ZERO, M: tl.constexpr,
             N2: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, PREC: tl.constexpr):
    """DQ [B, 3, c, L] <- gradients at q; DH [splits, c, 2, M, N2] <- the sum over the program's rows of conj(U) G; SUMS
    [splits, c] <- that of the bias' gradient; y takes the place of DY [B, C, L]. U [splits, c, 2, M, N2] is a place for
    the spectrum of u."""
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
    CL, part = C.to(tl.int64) * L, here.to(tl.int64) * L
    total = 0.0
    for i in range(tl.program_id(1), batch, tl.num_programs(1)):
        b = c * 0 + i
        x0 = P + (b.to(tl.int64) * (3 * C) + row) * L
        dy_row = DY + (b.to(tl.int64) * C + row) * L
        dq = DQ + (b.to(tl.int64) * (3 * here) + c) * L
        m = n + b * ZERO
        u = taps(x0, CL, m, L, W, B, C + row, K) * taps(x0, 2 * CL, m, L, W, B, 2 * C + row, K)
        u, s = scaled(u, ROOM)
        ur, ui = forward_real(narrow(u, PREC), F1, F2, TW, m, PLANE, PREC)
        tl.store(spectrum_u + m, ur)
        tl.store(spectrum_u + PLANE + m, ui)
        tl.debug_barrier()  # read below by other threads: loads and stores are laid out differently
        m = n + (b + 1) * ZERO
        g = tl.load(dy_row + m, mask=m < L, other=0.0).to(tl.float32) * taps(x0, 0, m, L, W, B, row, K)
        g, t = scaled(g, ROOM)
        g = narrow(g, PREC)
        gr, gi = forward_real(g, F1, F2, TW, m, PLANE, PREC)
        add_correlation(dh, spectrum_u, PLANE, m, b < tl.num_programs(1), gr, gi, s * t)
        pr, pi = multiply_conjugate(gr, gi, tl.load(h + m), tl.load(h + PLANE + m))
        m = n + (b + 2) * ZERO
        ok = m < L
        du = inverse_real(pr, pi, F1, F2, TW, m, PLANE, PREC) * (t * hs)
        g = g.to(tl.float32) * t
        x1, v = taps(x0, CL, m, L, W, B, C + row, K), taps(x0, 2 * CL, m, L, W, B, 2 * C + row, K)
        total += tl.sum(tl.sum(g * (x1 * v), axis=0), axis=0)
        du += bias * g
        tl.store(dq + part + m, (du * v).to(DQ.dtype.element_ty), mask=ok)
        tl.store(dq + 2 * part + m, (du * x1).to(DQ.dtype.element_ty), mask=ok)
        m = n + (b + 3) * ZERO
        ok = m < L
        pr, pi = multiply(tl.load(spectrum_u + m), tl.load(spectrum_u + PLANE + m), tl.load(h + m),
                          tl.load(h + PLANE + m))
        conv = inverse_real(pr, pi, F1, F2, TW, m, PLANE, PREC) * (s * hs)
        conv += bias * (taps(x0, CL, m, L, W, B, C + row, K) * taps(x0, 2 * CL, m, L, W, B, 2 * C + row, K))
        dy = tl.load(dy_row + m, mask=ok, other=0.0).to(tl.float32)
        y = conv * taps(x0, 0, m, L, W, B, row, K)
        tl.debug_barrier()  # dy was read before y takes its place, and this row's U before the next one's
        tl.store(dq + m, (conv * dy).to(DQ.dtype.element_ty), mask=ok)
        tl.store(dy_row + m, y.to(DY.dtype.element_ty), mask=ok)
    tl.store(SUMS + tl.program_id(1) * here + c, total)
