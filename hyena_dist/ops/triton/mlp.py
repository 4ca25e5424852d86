"""The MLP with the layer norm before it and the residual after it,

    y = second gelu(first norm(x) + first_bias) + second_bias (+ x),

as one kernel for each direction: what is as wide as the inner channels stays on the chip. The forward pass writes y
alone. The backward pass makes everything again, and writes norm(x), GELU of the inner channels and the gradient at
them, which two products of torch multiply to the weights' gradients.

Legend: n tokens, D channels, DP of them with padding, I inner channels. Norm and GELU are those of `norm` and `gelu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.triton.gelu import gate, slope
from hyena_dist.ops.triton.norm import standardised
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
def normalised(x, NORM_WEIGHT, NORM_BIAS, d, eps, NORM: tl.constexpr, D: tl.constexpr):
    """[ROWS, DP], float32."""
    x = x.to(tl.float32)
    if NORM:
        h, _ = standardised(x, (d < D)[None, :], eps, D)
        x = h * tl.load(NORM_WEIGHT + d, mask=d < D, other=0.0)[None, :]
        x += tl.load(NORM_BIAS + d, mask=d < D, other=0.0)[None, :]
    return x


@triton.jit
def load_first(FIRST, j, I, D: tl.constexpr, DP: tl.constexpr):
    """Rows j of FIRST [I, D]: [BLOCK, DP]."""
    d = tl.arange(0, DP)[None, :]
    return factor(tl.load(FIRST + j[:, None] * D + d, mask=(j < I)[:, None] & (d < D), other=0.0))


@triton.jit
def load_second(SECOND, j, I, D: tl.constexpr, DP: tl.constexpr):
    """Columns j of SECOND [D, I]: [DP, BLOCK]."""
    d = tl.arange(0, DP)[:, None]
    return factor(tl.load(SECOND + d * I + j[None, :], mask=(d < D) & (j < I)[None, :], other=0.0))


@triton.jit(do_not_specialize=["COUNT"])
def mlp_forward(X, NORM_WEIGHT, NORM_BIAS, FIRST, FIRST_BIAS, SECOND, SECOND_BIAS, Y, COUNT, I, eps, ZERO,
                NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Y [COUNT, D] <- the MLP of X [COUNT, D], with ADD plus X. Grid (COUNT / ROWS,). ZERO is 0, which the compiler
    does not know: what is read again is not kept in registers meanwhile."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    at, ok = i.to(tl.int64)[:, None] * D + d[None, :], (i < COUNT)[:, None] & (d < D)[None, :]
    n = normalised(tl.load(X + at, mask=ok, other=0.0), NORM_WEIGHT, NORM_BIAS, d, eps, NORM, D)
    n = factor(n.to(FIRST.dtype.element_ty))
    y = tl.zeros([ROWS, DP], tl.float32)
    for start in range(0, I, BLOCK):
        j = start + tl.arange(0, BLOCK)
        h = tl.dot(n, tl.trans(load_first(FIRST, j, I, D, DP)))
        h += tl.load(FIRST_BIAS + j, mask=j < I, other=0.0).to(tl.float32)[None, :]
        a = (h * gate(h)).to(FIRST.dtype.element_ty)
        y = tl.dot(factor(a), tl.trans(load_second(SECOND, j, I, D, DP)), y)
    if BIAS:
        y += tl.load(SECOND_BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += tl.load(X + at + ZERO, mask=ok, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["COUNT"])
def mlp_backward(X, NORM_WEIGHT, NORM_BIAS, DY, FIRST, FIRST_BIAS, SECOND, N, G, A, DH, DX, SUMS, COUNT, I, eps, ZERO,
                 NORM: tl.constexpr, LOWER: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """From DY [COUNT, D]: N [COUNT, D] <- norm(X), A [COUNT, I] <- GELU of the inner channels, DH [COUNT, I] <- the
    gradient at these, DX [COUNT, D] <- that at X, with ADD plus DY, with LOWER G [COUNT, D] <- DY. SUMS
    [programs, I + 3 D] <- the gradients of the program's rows at FIRST_BIAS, SECOND_BIAS, NORM_WEIGHT and NORM_BIAS,
    the last two with NORM. Grid (COUNT / ROWS,). ZERO as above."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    at, ok = i.to(tl.int64)[:, None] * D + d[None, :], (i < COUNT)[:, None] & (d < D)[None, :]
    sums = SUMS + tl.program_id(0).to(tl.int64) * (I + 3 * D)
    n = normalised(tl.load(X + at, mask=ok, other=0.0), NORM_WEIGHT, NORM_BIAS, d, eps, NORM, D)
    n = n.to(FIRST.dtype.element_ty)
    tl.store(N + at, n, mask=ok)
    n = factor(n)
    dy = tl.load(DY + at, mask=ok, other=0.0)
    tl.store(sums + I + d, tl.sum(dy.to(tl.float32), 0), mask=d < D)
    dy = dy.to(FIRST.dtype.element_ty)
    if LOWER:
        tl.store(G + at, dy, mask=ok)
    dy = factor(dy)
    dn = tl.zeros([ROWS, DP], tl.float32)
    for start in range(0, I, BLOCK):
        j = start + tl.arange(0, BLOCK)
        first = load_first(FIRST, j, I, D, DP)
        h = tl.dot(n, tl.trans(first))
        h += tl.load(FIRST_BIAS + j, mask=j < I, other=0.0).to(tl.float32)[None, :]
        da = tl.dot(dy, load_second(SECOND, j, I, D, DP))
        s = gate(h)
        dh = da * slope(h, s)
        inner, inside = i.to(tl.int64)[:, None] * I + j[None, :], (i < COUNT)[:, None] & (j < I)[None, :]
        tl.store(A + inner, (h * s).to(A.dtype.element_ty), mask=inside)
        tl.store(sums + j, tl.sum(dh, 0), mask=j < I)
        dh = dh.to(DH.dtype.element_ty)
        tl.store(DH + inner, dh, mask=inside)
        dn = tl.dot(factor(dh), first, dn)
    if NORM:
        x = tl.load(X + at + ZERO, mask=ok, other=0.0).to(tl.float32)
        h, spread = standardised(x, (d < D)[None, :], eps, D)
        tl.store(sums + I + D + d, tl.sum(dn * h, 0), mask=d < D)
        tl.store(sums + I + 2 * D + d, tl.sum(dn, 0), mask=d < D)
        dn *= tl.load(NORM_WEIGHT + d, mask=d < D, other=0.0)[None, :]
        dn = spread * (dn - tl.sum(dn, 1)[:, None] / D - h * (tl.sum(dn * h, 1)[:, None] / D))
    if ADD:
        dn += tl.load(DY + at + ZERO, mask=ok, other=0.0).to(tl.float32)
    tl.store(DX + at, dn.to(DX.dtype.element_ty), mask=ok)


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


@torch.library.custom_op("hyena::mlp_backward", mutates_args=("n", "g", "a", "dh", "dx"))
def backward(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dy: Tensor, first: Tensor,
             first_bias: Tensor, second: Tensor, residual: bool, n: Tensor, g: Tensor | None, a: Tensor, dh: Tensor,
             dx: Tensor) -> Tensor:
    """From dy [n, D]: n [n, D] <- norm(x), g [n, D] <- dy, both in the weights' dtype, a [n, I] <- GELU of the inner
    channels, dh [n, I] <- the gradient at these, dx [n, D] <- that at x. Returns those at first_bias, second_bias and
    the norm's weight and bias, one after the other, [I + 3 D] in float32; without a norm the last two are nothing."""
    count, width = x.shape
    sizes, options = _plan(x, backward=True)
    programs = triton.cdiv(count, sizes["ROWS"])
    sums = torch.empty(programs, len(first) + 3 * width, dtype=torch.float32, device=x.device)
    if count:
        with torch.cuda.device_of(x):
            mlp_backward[(programs,)](
                x, *_norm(x, norm_weight, norm_bias), dy, first, first_bias, second, n, n if g is None else g, a, dh,
                dx, sums, count, len(first), eps, 0, NORM=norm_weight is not None, LOWER=g is not None, ADD=residual,
                D=width, **sizes, **options)
    return sums.sum(0)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, x) if weight is None or bias is None else (weight, bias)


def _plan(x: Tensor, *, backward: bool) -> tuple[Options, Options]:
    """Constants and options of a launch, by what spills fewest registers. With two stages the weights of the next block
    of inner channels come while those of this one are multiplied; a backward pass of few channels has two programs at a
    time for that, because its compiler makes such products wait for each other."""
    padded, wide = triton.next_power_of_2(max(16, x.shape[1])), wide_memory(x.device)
    if wide and (padded > 128 or not backward):
        rows, block, warps, stages = 128, 32 if backward else 64, 8, 2
    elif padded > 128:
        rows, block, warps, stages = (32, 32, 4, 1) if backward else (64, 32, 8, 1)
    else:
        rows, block, warps, stages = 64, 32, 4, 1
    return {"DP": padded, "ROWS": rows, "BLOCK": block}, {"num_warps": warps, "num_stages": stages}


forward.register_fake(lambda *_: None)
backward.register_fake(lambda x, _weight, _bias, _eps, _dy, first, *_: x.new_empty(
    len(first) + 3 * x.shape[1], dtype=torch.float32))
declare_cost("hyena::mlp", lambda x, _weight, _bias, _eps, first, *rest: Cost(
    x.nbytes + rest[-1].nbytes, 4.0 * x.numel() * len(first), 1))
declare_cost("hyena::mlp_backward", lambda x, _weight, _bias, _eps, dy, first, *rest: Cost(
    x.nbytes + dy.nbytes + sum(t.nbytes for t in rest[3:] if t is not None)
    + 4 * triton.cdiv(len(x), _plan(x, backward=True)[0]["ROWS"]) * (len(first) + 3 * x.shape[1]),
    6.0 * x.numel() * len(first), 2))
