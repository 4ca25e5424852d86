"""What stands around the transforms of cuFFT: the short convolution, the gates and the twist of the right-angle
convolution (`ops.long_conv.RightAngle`) in one pass before, one between and one after them.

Spectra Z [rows, N] are complex64, seen as pairs of float32. TWIST [2, L]: real and imaginary parts of w^n. Channels
here, c, begin at c0 of C.
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.short import taps


@triton.jit
def load_pairs(Z, first, count, BLOCK: tl.constexpr):
    """Complex numbers first .. first + BLOCK - 1 of the `count` at Z, as (real, imaginary)."""
    m = 2 * first + tl.arange(0, 2 * BLOCK)
    return tl.split(tl.reshape(tl.load(Z + m, mask=m < 2 * count, other=0.0), [BLOCK, 2]))


@triton.jit
def store_pairs(Z, re, im, first, count, BLOCK: tl.constexpr):
    m = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(Z + m, tl.interleave(re, im), mask=m < 2 * count)


@triton.jit
def load_twist(TWIST, n, L, ok):
    return tl.load(TWIST + n, mask=ok, other=0.0), tl.load(TWIST + (L + n), mask=ok, other=0.0)


@triton.jit(do_not_specialize=["C", "c0"])
def enter(X, DY, W, B, TWIST, Z, L, N, C, c0, WHAT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Z [B, c, N] <- a real row times its twist, then zeros. WHAT it is: "u" = x1 v of X = p; "g" = dy x0, times the
    other twist; "h": a row of X [C, L]. Grid (N / BLOCK, c, B)."""
    block, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < L
    row = c0 + c
    wr, wi = load_twist(TWIST, n, L, ok)
    if WHAT == "h":
        x = tl.load(X + row.to(tl.int64) * L + n, mask=ok, other=0.0).to(tl.float32)
    else:
        base = (b.to(tl.int64) * (3 * C) + row) * L
        CL = C.to(tl.int64) * L
        if WHAT == "u":
            x = taps(X, base + CL, n, L, W, B, C + row, K) * taps(X, base + 2 * CL, n, L, W, B, 2 * C + row, K)
        else:
            dy = tl.load(DY + (b.to(tl.int64) * C + row) * L + n, mask=ok, other=0.0).to(tl.float32)
            x = dy * taps(X, base, n, L, W, B, row, K)
            wi = -wi
    z = Z + (b.to(tl.int64) * tl.num_programs(1) + c) * N * 2
    store_pairs(z, x * wr, x * wi, block * BLOCK, N, BLOCK)


@triton.jit(do_not_specialize=["batch"])
def multiply(U, G, H, DH, N, batch, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """U [B, c, N] <- U H with H [c, N]; with BACKWARD also DH [c, N] <- sum over B of U G, and G <- G H.
    Grid (N / BLOCK, c)."""
    first, c, channels = tl.program_id(0) * BLOCK, tl.program_id(1), tl.num_programs(1)
    hr, hi = load_pairs(H + c.to(tl.int64) * N * 2, first, N, BLOCK)
    dr = tl.zeros([BLOCK], tl.float32)
    di = tl.zeros([BLOCK], tl.float32)
    for b in range(batch):
        row = ((c * 0 + b).to(tl.int64) * channels + c) * N * 2
        ur, ui = load_pairs(U + row, first, N, BLOCK)
        store_pairs(U + row, ur * hr - ui * hi, ur * hi + ui * hr, first, N, BLOCK)
        if BACKWARD:
            gr, gi = load_pairs(G + row, first, N, BLOCK)
            store_pairs(G + row, gr * hr - gi * hi, gr * hi + gi * hr, first, N, BLOCK)
            dr += ur * gr - ui * gi
            di += ur * gi + ui * gr
    if BACKWARD:
        store_pairs(DH + c.to(tl.int64) * N * 2, dr, di, first, N, BLOCK)


@triton.jit(do_not_specialize=["C", "c0"])
def leave(Z, P, Y, W, B, BIAS, TWIST, L, N, C, c0, scale, K: tl.constexpr, BLOCK: tl.constexpr):
    """Y [B, C, L] <- x0 (h (*) u + bias u), where Z [B, c, N] holds the convolution, twisted and N times too large.
    Grid (L / BLOCK, c, B)."""
    block, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < L
    row = c0 + c
    base = (b.to(tl.int64) * (3 * C) + row) * L
    CL = C.to(tl.int64) * L
    wr, wi = load_twist(TWIST, n, L, ok)
    re, im = load_pairs(Z + (b.to(tl.int64) * tl.num_programs(1) + c) * N * 2, block * BLOCK, N, BLOCK)
    u = taps(P, base + CL, n, L, W, B, C + row, K) * taps(P, base + 2 * CL, n, L, W, B, 2 * C + row, K)
    conv = (re * wr + im * wi) * scale + tl.load(BIAS + row).to(tl.float32) * u
    y = conv * taps(P, base, n, L, W, B, row, K)
    tl.store(Y + (b.to(tl.int64) * C + row) * L + n, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["C", "c0"])
def leave_backward(ZU, ZG, P, DY, DQ, SUMS, W, B, BIAS, TWIST, L, N, C, c0, scale, K: tl.constexpr,
                   BLOCK: tl.constexpr):
    """From the convolution ZU and the gradient at u ZG, both [B, c, N], twisted and N times too large: DQ [B, 3, c, L],
    gradients at q; SUMS [B, c, blocks], the block's gradient of the bias; y takes the place of DY [B, C, L].
    Grid (L / BLOCK, c, B)."""
    block, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tl.num_programs(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < L
    row = c0 + c
    base = (b.to(tl.int64) * (3 * C) + row) * L
    CL = C.to(tl.int64) * L
    z = (b.to(tl.int64) * here + c) * N * 2
    dy_at = DY + (b.to(tl.int64) * C + row) * L + n
    wr, wi = load_twist(TWIST, n, L, ok)
    bias = tl.load(BIAS + row).to(tl.float32)
    x0 = taps(P, base, n, L, W, B, row, K)
    x1 = taps(P, base + CL, n, L, W, B, C + row, K)
    v = taps(P, base + 2 * CL, n, L, W, B, 2 * C + row, K)
    dy = tl.load(dy_at, mask=ok, other=0.0).to(tl.float32)
    re, im = load_pairs(ZU + z, block * BLOCK, N, BLOCK)
    conv = (re * wr + im * wi) * scale + bias * (x1 * v)
    re, im = load_pairs(ZG + z, block * BLOCK, N, BLOCK)
    g = dy * x0
    du = (re * wr - im * wi) * scale + bias * g
    tl.store(SUMS + (b.to(tl.int64) * here + c) * tl.num_programs(0) + block, tl.sum(g * (x1 * v)))
    dq = DQ + (b.to(tl.int64) * (3 * here) + c) * L + n
    part = here.to(tl.int64) * L
    tl.debug_barrier()  # dy was read before y takes its place
    tl.store(dq, (conv * dy).to(DQ.dtype.element_ty), mask=ok)
    tl.store(dq + part, (du * v).to(DQ.dtype.element_ty), mask=ok)
    tl.store(dq + 2 * part, (du * x1).to(DQ.dtype.element_ty), mask=ok)
    tl.store(dy_at, (conv * x0).to(DY.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["c0"])
def real_part(Z, TWIST, OUT, L, N, c0, scale, BLOCK: tl.constexpr):
    """OUT [C, L] <- Re(w^n Z) scale, Z [c, N]. Grid (L / BLOCK, c)."""
    block, c = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < L
    wr, wi = load_twist(TWIST, n, L, ok)
    re, im = load_pairs(Z + c.to(tl.int64) * N * 2, block * BLOCK, N, BLOCK)
    tl.store(OUT + (c0 + c).to(tl.int64) * L + n, ((re * wr - im * wi) * scale).to(OUT.dtype.element_ty), mask=ok)
