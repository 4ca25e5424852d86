"""Device functions of the matrix transforms: products with tables on the tensor cores, scales, complex products.

PREC is "half" (operands float16, float16 arithmetic between the products: for half-precision activations) or "split"
(every operand as the sum of two float16, three products: the accuracy of float32). What float16 holds is scaled by
powers of two, so that no finite input overflows: with an operand's largest part below 16 ("half") or 128 ("split"), and
every stage but the right-hand product unitary, no element passes 46,500 up to 8,192 points by Parseval's equation.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two(m):
    """m >= 0 -> 2^e and 2^-e with e = floor(log2 m), by the exponent's bits: exact. An empty row counts as 1e-30."""
    bits = tl.maximum(m, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def largest(x):
    return tl.max(tl.max(tl.abs(x), axis=0), axis=0)


@triton.jit
def scaled(x, ROOM: tl.constexpr):
    """x = scale * (what is returned first, whose largest element is in [ROOM, 2 ROOM))."""
    s, inverse = power_of_two(largest(x))
    return x * (inverse * ROOM), s * (1.0 / ROOM)


@triton.jit
def scaled_pair(re, im, ROOM: tl.constexpr):
    s, inverse = power_of_two(tl.maximum(largest(re), largest(im)))
    inverse = inverse * ROOM
    return re * inverse, im * inverse, s * (1.0 / ROOM)


@triton.jit
def narrow(x, PREC: tl.constexpr):
    """The dtype of arithmetic between the products."""
    if PREC == "half":
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def split(x):
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_table(T, R: tl.constexpr, PREC: tl.constexpr):
    """(re, im), or (re, im, re low, im low), each [R, R]."""
    at = tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]
    return load_planes(T, at, R * R, PREC)


@triton.jit
def load_planes(T, at, PLANE: tl.constexpr, PREC: tl.constexpr):
    if PREC == "half":
        return tl.load(T + at), tl.load(T + PLANE + at)
    else:
        return tl.load(T + at), tl.load(T + PLANE + at), tl.load(T + 2 * PLANE + at), tl.load(T + 3 * PLANE + at)


@triton.jit
def table_times(high, low, x, total, PREC: tl.constexpr):
    """total + table @ x."""
    if PREC == "half":
        return tl.dot(high, x.to(tl.float16), total)
    else:
        h, l = split(x)
        return tl.dot(high, h, tl.dot(low, h, tl.dot(high, l, total)))


@triton.jit
def times_table(x, high, low, total, PREC: tl.constexpr):
    """total + x @ table."""
    if PREC == "half":
        return tl.dot(x.to(tl.float16), high, total)
    else:
        h, l = split(x)
        return tl.dot(h, high, tl.dot(h, low, tl.dot(l, high, total)))


@triton.jit
def multiply(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def multiply_conjugate(ar, ai, br, bi):
    """(ar + i ai) (br - i bi)"""
    return ar * br + ai * bi, ai * br - ar * bi


@triton.jit
def left_real(u, F, PREC: tl.constexpr):
    """F @ u of a real u."""
    zero = tl.zeros([F[0].shape[0], u.shape[1]], tl.float32)
    return (narrow(table_times(F[0], F[-2], u, zero, PREC), PREC),
            narrow(table_times(F[1], F[-1], u, zero, PREC), PREC))


@triton.jit
def left(ar, ai, F, PREC: tl.constexpr):
    """F @ (ar + i ai). In this order one pair of operands lives at a time, here and below."""
    zero = tl.zeros(ar.shape, tl.float32)
    zi = table_times(F[0], F[-2], ai, table_times(F[1], F[-1], ar, zero, PREC), PREC)
    zr = table_times(F[1], F[-1], -ai, table_times(F[0], F[-2], ar, zero, PREC), PREC)
    return narrow(zr, PREC), narrow(zi, PREC)


@triton.jit
def right(br, bi, F, PREC: tl.constexpr):
    """(br + i bi) @ F."""
    zero = tl.zeros(br.shape, tl.float32)
    zi = times_table(bi, F[0], F[-2], times_table(br, F[1], F[-1], zero, PREC), PREC)
    zr = times_table(-bi, F[1], F[-1], times_table(br, F[0], F[-2], zero, PREC), PREC)
    return narrow(zr, PREC), narrow(zi, PREC)


@triton.jit
def right_conjugate(br, bi, F, PREC: tl.constexpr):
    """(br + i bi) @ conj(F)."""
    zero = tl.zeros(br.shape, tl.float32)
    zr = times_table(bi, F[1], F[-1], times_table(br, F[0], F[-2], zero, PREC), PREC)
    zi = times_table(-br, F[1], F[-1], times_table(bi, F[0], F[-2], zero, PREC), PREC)
    return narrow(zr, PREC), narrow(zi, PREC)


@triton.jit
def left_adjoint(ar, ai, F, PREC: tl.constexpr):
    """conj(F)^T @ (ar + i ai), float32."""
    zero = tl.zeros(ar.shape, tl.float32)
    zr = table_times(tl.trans(F[1]), tl.trans(F[-1]), ai,
                     table_times(tl.trans(F[0]), tl.trans(F[-2]), ar, zero, PREC), PREC)
    zi = table_times(tl.trans(F[1]), tl.trans(F[-1]), -ar,
                     table_times(tl.trans(F[0]), tl.trans(F[-2]), ai, zero, PREC), PREC)
    return zr, zi


@triton.jit
def left_adjoint_real(ar, ai, F, PREC: tl.constexpr):
    """Its real part, float32."""
    zero = tl.zeros(ar.shape, tl.float32)
    y = table_times(tl.trans(F[0]), tl.trans(F[-2]), ar, zero, PREC)
    return table_times(tl.trans(F[1]), tl.trans(F[-1]), ai, y, PREC)


@triton.jit
def forward_real(u, F1, F2, TW, at, PLANE: tl.constexpr, PREC: tl.constexpr):
    """The transform of a real tile; `at` are the places of its twiddles at TW."""
    ar, ai = left_real(u, F1, PREC)
    br, bi = multiply(ar, ai, tl.load(TW + at), tl.load(TW + PLANE + at))
    return right(br, bi, F2, PREC)


@triton.jit
def inverse_real(pr, pi, F1, F2, TW, at, PLANE: tl.constexpr, PREC: tl.constexpr):
    br, bi = right_conjugate(pr, pi, F2, PREC)
    ar, ai = multiply_conjugate(br, bi, tl.load(TW + at), tl.load(TW + PLANE + at))
    return left_adjoint_real(ar, ai, F1, PREC)


@triton.jit
def spectrum_scale(re, im, R: tl.constexpr):
    """Inverse and scale of a spectrum that multiplies what comes out of a right-hand product with an [R, R] table,
    which is not unitary: the scale takes sqrt(R) back."""
    s, inverse = power_of_two(tl.maximum(largest(re), largest(im)))
    ROOT: tl.constexpr = 16.0 if R > 128 else (8.0 if R > 32 else (4.0 if R > 8 else 2.0))
    return inverse * (1.0 / ROOT), s * ROOT


@triton.jit
def add_correlation(DH, U, PLANE, at, first, gr, gi, scale):
    """DH += conj(U) (gr + i gi) scale at places `at`, = if `first`: float32."""
    ur, ui = tl.load(U + at).to(tl.float32), tl.load(U + PLANE + at).to(tl.float32)
    re, im = multiply_conjugate(gr.to(tl.float32), gi.to(tl.float32), ur, ui)
    later = (at >= 0) & (first == 0)
    re = tl.load(DH + at, mask=later, other=0.0) + re * scale
    im = tl.load(DH + PLANE + at, mask=later, other=0.0) + im * scale
    tl.store(DH + at, re)
    tl.store(DH + PLANE + at, im)
