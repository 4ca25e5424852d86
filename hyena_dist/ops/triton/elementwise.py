"""What stands around the transforms of cuFFT: the short convolution, the gates and the twist of the right-angle
convolution (`ops.long_conv.RightAngle`) in one pass before, one between and one after them.

Spectra Z [rows, N] are complex64, seen as pairs of float32. TWIST [2, L]: real and imaginary parts of w^n.
"""

import triton
import triton.language as tl

from hyena_dist.ops.triton.given import entering, factor, gated, place_of, store_gradient, token


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
def enter(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, TWIST, Z, N, OTHER: tl.constexpr,
          GATE: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr,
          BLOCK: tl.constexpr):
    """Z [rows, c, N] <- what is given, u, filters, or the result's gradient and its gate, times its twist, or with
    OTHER the other one; then zeros. Grid (N / BLOCK, c, rows)."""
    block, c, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p, x = P + (b * p_b + c.to(tl.int64) * p_c + start), X + (b * x_b + c.to(tl.int64) * x_c)
    n = block * BLOCK + tl.arange(0, BLOCK)
    wr, wi = load_twist(TWIST, n, L, n < L)
    x += token(n, start, l, x_slice, SLICES)
    u = entering(p, x, p_block, n, size, W, B, c0 + c, C, GATE, BLOCKS, K)
    if OTHER:
        wi = -wi
    z = Z + (r.to(tl.int64) * tl.num_programs(1) + c) * N * 2
    store_pairs(z, u * wr, u * wi, block * BLOCK, N, BLOCK)


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
def leave(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, Z, Y, y_b, y_c, y_slice, BIAS, TWIST,
          N, scale, GATE: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr,
          SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """Y [B, c, L] <- gate (h (*) u + bias u) of what is given, where Z [rows, c, N] holds the convolution, twisted and
    N times too large. Grid (L / BLOCK, c, rows)."""
    block, c, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = c0 + c
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p, x = P + (b * p_b + c.to(tl.int64) * p_c + start), X + (b * x_b + c.to(tl.int64) * x_c)
    n = block * BLOCK + tl.arange(0, BLOCK)
    wr, wi = load_twist(TWIST, n, L, n < L)
    re, im = load_pairs(Z + (r.to(tl.int64) * tl.num_programs(1) + c) * N * 2, block * BLOCK, N, BLOCK)
    y = (re * wr + im * wi) * scale
    x += token(n, start, l, x_slice, SLICES)
    y += tl.load(BIAS + row).to(tl.float32) * entering(p, x, p_block, n, size, W, B, row, C, -1, BLOCKS, K)
    y = gated(y, p, p_block, n, size, W, B, row, C, GATE, K)
    out = Y + (b * y_b + c.to(tl.int64) * y_c) + token(n, start, l, y_slice, SLICES)
    tl.store(out, y.to(Y.dtype.element_ty), mask=n < size)


@triton.jit(do_not_specialize=["C", "c0"])
def leave_backward(P, X, W, B, PLACES, L, p_b, p_block, p_c, x_b, x_c, x_slice, l, C, c0, ZU, ZG, DY, y_b, y_c, y_slice,
                   DQ, q_b, q_block, q_c, DX, SUMS, BIAS, TWIST, N, scale, GATE: tl.constexpr, BLOCKS: tl.constexpr,
                   K: tl.constexpr, SEGMENTS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """From the convolution ZU and the gradient at u ZG, both [rows, c, N], twisted and N times too large: DQ
    [B, blocks, c, L], gradients at the gate and at u's factors, or DX [B, c, L], of X's strides, that at u; SUMS
    [rows, c, programs], the program's part of the bias' gradient; y takes the place of DY [B, c, L].
    Grid (L / BLOCK, c, rows)."""
    block, c, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tl.num_programs(1)
    row = c0 + c
    b, start, size = place_of(PLACES, r, L, SEGMENTS)
    p = P + (b * p_b + c.to(tl.int64) * p_c + start)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < size
    x_place = b * x_b + c.to(tl.int64) * x_c + token(n, start, l, x_slice, SLICES)
    z = (r.to(tl.int64) * here + c) * N * 2
    dq = DQ + (b * q_b + c.to(tl.int64) * q_c + start)
    dy_at = DY + (b * y_b + c.to(tl.int64) * y_c) + token(n, start, l, y_slice, SLICES)
    wr, wi = load_twist(TWIST, n, L, n < L)
    bias = tl.load(BIAS + row).to(tl.float32)
    u = entering(p, X + x_place, p_block, n, size, W, B, row, C, -1, BLOCKS, K)
    g = tl.load(dy_at, mask=ok, other=0.0).to(tl.float32)
    re, im = load_pairs(ZU + z, block * BLOCK, N, BLOCK)
    conv = (re * wr + im * wi) * scale + bias * u
    tl.debug_barrier()  # dy was read before y takes its place
    if GATE >= 0:
        gate = factor(p, GATE, p_block, n, size, W, B, row, C, K)
        tl.store(dq + tl.cast(q_block, tl.int64) * GATE + n, (conv * g).to(DQ.dtype.element_ty), mask=ok)
        g *= gate
        conv *= gate
    tl.store(dy_at, conv.to(DY.dtype.element_ty), mask=ok)
    tl.store(SUMS + (r.to(tl.int64) * here + c) * tl.num_programs(0) + block, tl.sum(g * u))
    re, im = load_pairs(ZG + z, block * BLOCK, N, BLOCK)
    du = (re * wr - im * wi) * scale + bias * g
    store_gradient(du, p, dq, DX + x_place, p_block, q_block, n, size, W, B, row, C, BLOCKS, K)


@triton.jit
def real_part(Z, TWIST, OUT, L, out_c, N, scale, BLOCK: tl.constexpr):
    """The first L lags of OUT [c, at least L] <- Re(w^n Z) scale, Z [c, N]. Grid (L / BLOCK, c)."""
    block, c = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ok = n < L
    wr, wi = load_twist(TWIST, n, L, ok)
    re, im = load_pairs(Z + c.to(tl.int64) * N * 2, block * BLOCK, N, BLOCK)
    tl.store(OUT + c.to(tl.int64) * out_c + n, ((re * wr - im * wi) * scale).to(OUT.dtype.element_ty), mask=ok)
