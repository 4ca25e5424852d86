"""The MLP with the layer norm before it and the residual after it,

    y = second gelu(first norm(x) + first_bias) + second_bias (+ x),

as one kernel for each direction: what is as wide as the inner channels stays on the chip. The forward pass writes y
alone. The backward pass, of norm(x) and the gradient there, makes the inner channels again, and writes GELU of them and
the gradient at them, which two products of torch multiply to the weights' gradients.

Legend: n tokens, D channels, DP of them with padding, I inner channels. Norm and GELU are those of `norm` and `gelu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.triton.gelu import gate, slope
from hyena_dist.ops.triton.plans import Options, wide_memory

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def factor(x):
    """Of a product. Triton's interpreter takes bfloat16 for integers there, and is given float32."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def load_part(X, i, d, COUNT, D: tl.constexpr):
    """Rows i and columns d of X [COUNT, D]."""
    at, inside = i.to(tl.int64)[:, None] * D + d[None, :], (i < COUNT)[:, None] & (d < D)[None, :]
    return tl.load(X + at, mask=inside, other=0.0)


@triton.jit
def store_part(X, i, d, x, COUNT, D: tl.constexpr):
    tl.store(X + i.to(tl.int64)[:, None] * D + d[None, :], x.to(X.dtype.element_ty),
             mask=(i < COUNT)[:, None] & (d < D)[None, :])


@triton.jit
def load_first(FIRST, j, d, I, D: tl.constexpr):
    """Rows j and columns d of FIRST [I, D]."""
    return factor(tl.load(FIRST + j[:, None] * D + d[None, :], mask=(j < I)[:, None] & (d < D)[None, :], other=0.0))


@triton.jit
def load_second(SECOND, j, d, I, D: tl.constexpr):
    """Rows d and columns j of SECOND [D, I]."""
    return factor(tl.load(SECOND + d[:, None] * I + j[None, :], mask=(d < D)[:, None] & (j < I)[None, :], other=0.0))


@triton.jit
def statistics(X, i, left, right, COUNT, eps, ZERO, NORM: tl.constexpr, D: tl.constexpr):
    """[ROWS, 1], what `standardised` subtracts from rows i of X, and what it multiplies them by."""
    mean = tl.zeros([i.shape[0], 1], tl.float32)
    spread = mean + 1.0
    if NORM:
        mean += tl.sum(load_part(X, i, left, COUNT, D).to(tl.float32), 1)[:, None]
        mean += tl.sum(load_part(X, i, right, COUNT, D).to(tl.float32), 1)[:, None]
        mean = mean / D
        a = standardised(X + ZERO, i, left, COUNT, mean, spread, D)
        square = tl.sum(a * a, 1)[:, None]
        a = standardised(X + ZERO, i, right, COUNT, mean, spread, D)
        spread = tl.rsqrt((square + tl.sum(a * a, 1)[:, None]) / D + eps)
    return mean, spread


@triton.jit
def standardised(X, i, d, COUNT, mean, spread, D: tl.constexpr):
    """Rows i and columns d of X with mean 0 and variance 1, float32."""
    x = load_part(X, i, d, COUNT, D).to(tl.float32)
    return tl.where((d < D)[None, :], (x - mean) * spread, 0.0)


@triton.jit
def normalised(X, NORM_WEIGHT, NORM_BIAS, i, d, COUNT, mean, spread, NORM: tl.constexpr, D: tl.constexpr):
    """norm(X), or X where there is no norm."""
    n = standardised(X, i, d, COUNT, mean, spread, D)
    if NORM:
        n = n * tl.load(NORM_WEIGHT + d, mask=d < D, other=0.0)[None, :]
        n += tl.load(NORM_BIAS + d, mask=d < D, other=0.0)[None, :]
    return n


@triton.jit(do_not_specialize=["COUNT"])
def mlp_forward(X, NORM_WEIGHT, NORM_BIAS, FIRST, FIRST_BIAS, SECOND, SECOND_BIAS, Y, COUNT, I, eps, ZERO,
                NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Y [COUNT, D] <- the MLP of X [COUNT, D], with ADD plus X. Grid (COUNT / ROWS,). Channels go in two halves: a
    program's registers do not hold all of a float32 x beside the sums. ZERO is 0, which the compiler does not know:
    what is read again is not kept in registers meanwhile."""
    HALF: tl.constexpr = DP // 2
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    left, right = tl.arange(0, HALF), HALF + tl.arange(0, HALF)
    mean, spread = statistics(X, i, left, right, COUNT, eps, ZERO, NORM, D)
    n = normalised(X + 2 * ZERO, NORM_WEIGHT, NORM_BIAS, i, left, COUNT, mean, spread, NORM, D)
    n_left = factor(n.to(FIRST.dtype.element_ty))
    n = normalised(X + 2 * ZERO, NORM_WEIGHT, NORM_BIAS, i, right, COUNT, mean, spread, NORM, D)
    n_right = factor(n.to(FIRST.dtype.element_ty))
    y_left = tl.zeros([ROWS, HALF], tl.float32)
    y_right = tl.zeros([ROWS, HALF], tl.float32)
    for start in range(0, I, BLOCK):
        j = start + tl.arange(0, BLOCK)
        h = tl.dot(n_left, tl.trans(load_first(FIRST, j, left, I, D)))
        h = tl.dot(n_right, tl.trans(load_first(FIRST, j, right, I, D)), h)
        h += tl.load(FIRST_BIAS + j, mask=j < I, other=0.0).to(tl.float32)[None, :]
        a = factor((h * gate(h)).to(FIRST.dtype.element_ty))
        y_left = tl.dot(a, tl.trans(load_second(SECOND, j, left, I, D)), y_left)
        y_right = tl.dot(a, tl.trans(load_second(SECOND, j, right, I, D)), y_right)
    finish(X + 3 * ZERO, SECOND_BIAS, Y, i, left, y_left, COUNT, BIAS, ADD, D)
    finish(X + 3 * ZERO, SECOND_BIAS, Y, i, right, y_right, COUNT, BIAS, ADD, D)


@triton.jit
def finish(X, SECOND_BIAS, Y, i, d, y, COUNT, BIAS: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr):
    if BIAS:
        y += tl.load(SECOND_BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += load_part(X, i, d, COUNT, D).to(tl.float32)
    store_part(Y, i, d, y, COUNT, D)


@triton.jit(do_not_specialize=["COUNT"])
def mlp_backward(N, DY, FIRST, FIRST_BIAS, SECOND, A, DH, DN, G, SUMS, COUNT, I, LOWER: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """From DY [COUNT, D]: A [COUNT, I] <- GELU of the inner channels, DH [COUNT, I] <- the gradient at these, DN
    [COUNT, D] <- that at N, with LOWER G [COUNT, D] <- DY, SUMS [programs, I + D] <- the sums of DH and of DY over the
    program's rows. Grid (COUNT / ROWS,)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    sums = SUMS + tl.program_id(0).to(tl.int64) * (I + D)
    dy = load_part(DY, i, d, COUNT, D)
    tl.store(sums + I + d, tl.sum(dy.to(tl.float32), 0), mask=d < D)
    dy = dy.to(N.dtype.element_ty)
    if LOWER:
        store_part(G, i, d, dy, COUNT, D)
    dy = factor(dy)
    n = factor(load_part(N, i, d, COUNT, D))
    dn = tl.zeros([ROWS, DP], tl.float32)
    for start in range(0, I, BLOCK):
        j = start + tl.arange(0, BLOCK)
        first = load_first(FIRST, j, d, I, D)
        h = tl.dot(n, tl.trans(first))
        h += tl.load(FIRST_BIAS + j, mask=j < I, other=0.0).to(tl.float32)[None, :]
        da = tl.dot(dy, load_second(SECOND, j, d, I, D))
        s = gate(h)
        dh = da * slope(h, s)
        inner, inside = i.to(tl.int64)[:, None] * I + j[None, :], (i < COUNT)[:, None] & (j < I)[None, :]
        tl.store(A + inner, (h * s).to(A.dtype.element_ty), mask=inside)
        tl.store(sums + j, tl.sum(dh, 0), mask=j < I)
        dh = dh.to(DH.dtype.element_ty)
        tl.store(DH + inner, dh, mask=inside)
        dn = tl.dot(factor(dh), first, dn)
    store_part(DN, i, d, dn, COUNT, D)


@torch.library.custom_op("hyena::mlp", mutates_args=("y",))
def forward(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, first: Tensor,
            first_bias: Tensor, second: Tensor, second_bias: Tensor | None, residual: bool, y: Tensor) -> None:
    """y [n, D] <- the MLP of x [n, D], with `residual` plus x. The weights are of half precision, the norm's float32;
    everything is contiguous."""
    count, width = x.shape
    sizes, options = _plan(x, backward=False)
    if count:
        with torch.cuda.device_of(x):
            mlp_forward[(triton.cdiv(count, sizes["ROWS"]),)](
                x, *_norm(x, norm_weight, norm_bias), first, first_bias, second,
                first_bias if second_bias is None else second_bias, y, count, len(first), eps, 0,
                NORM=norm_weight is not None, BIAS=second_bias is not None, ADD=residual, D=width, **sizes, **options)


@torch.library.custom_op("hyena::mlp_backward", mutates_args=("a", "dh", "dn", "g"))
def backward(n: Tensor, dy: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, a: Tensor, dh: Tensor,
             dn: Tensor, g: Tensor | None) -> Tensor:
    """From dy [n, D]: a [n, I] <- GELU of the inner channels, dh [n, I] <- the gradient at these, dn [n, D] <- that at
    n, g [n, D] <- dy in its own dtype, all contiguous; returns the sums of dh and of dy over n, [I + D] in float32."""
    count, width = n.shape
    sizes, options = _plan(n, backward=True)
    programs = triton.cdiv(count, sizes["ROWS"])
    sums = torch.empty(programs, len(first) + width, dtype=torch.float32, device=n.device)
    if count:
        with torch.cuda.device_of(n):
            mlp_backward[(programs,)](n.contiguous(), dy.contiguous(), first.contiguous(), first_bias.contiguous(),
                                      second.contiguous(), a, dh, dn, dn if g is None else g, sums, count, len(first),
                                      LOWER=g is not None, D=width, **sizes, **options)
    return sums.sum(0)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In the place of a norm that is not there something to point to."""
    return x if weight is None else weight, x if bias is None else bias


def _plan(x: Tensor, *, backward: bool) -> tuple[Options, Options]:
    """Constants and options of a launch, by what spills fewest registers, and none in a loop. With several stages the
    weights of the next blocks of inner channels come while those of this one are multiplied, where that does not make
    the compiler's products wait for each other. No tile of a Hopper's has 64 rows by 32 (`plans.WIDE_SHAPES`)."""
    padded, wide, block = triton.next_power_of_2(max(32, x.shape[1])), wide_memory(x.device), 32
    if wide and padded > 64:
        rows, warps, stages = 128, 8, 3 if not backward else 2 if padded > 128 else 1
    elif padded > 128:
        rows, warps, stages = (32, 4, 1) if backward else (64, 8, 1)
    else:
        rows, warps, stages = 64, 4, 1
        block = 64 if padded < 128 else 32
    return {"DP": padded, "ROWS": rows, "BLOCK": block}, {"num_warps": warps, "num_stages": stages}


forward.register_fake(lambda *_: None)
backward.register_fake(lambda _n, _dy, first, *_: first.new_empty(sum(first.shape), dtype=torch.float32))
declare_cost("hyena::mlp", lambda x, _weight, _bias, _eps, first, *rest: Cost(
    x.nbytes + rest[-1].nbytes, 4.0 * x.numel() * len(first), 1))
declare_cost("hyena::mlp_backward", lambda n, dy, first, _first_bias, _second, a, dh, dn, g: Cost(
    n.nbytes + dy.nbytes + a.nbytes + dh.nbytes + dn.nbytes + (0 if g is None else g.nbytes)
    + 4 * triton.cdiv(len(n), _plan(n, backward=True)[0]["ROWS"]) * sum(first.shape), 6.0 * n.numel() * len(first), 2))
