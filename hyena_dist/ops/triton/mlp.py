"""The MLP, second gelu(first n + first_bias) + second_bias, as one kernel for each direction: what is as wide as the
inner channels stays on the chip.

The forward pass writes nothing but its result. The backward pass makes the inner channels again, and writes GELU of
them and the gradient at them, which two products of torch multiply to the weights' gradients.

Legend: n tokens, D channels, DP of them with padding, I inner channels. GELU is that of `gelu`.
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
def load_rows(X, i, COUNT, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of X [COUNT, D]: [ROWS, DP]."""
    d = tl.arange(0, DP)[None, :]
    return tl.load(X + i.to(tl.int64)[:, None] * D + d, mask=(i < COUNT)[:, None] & (d < D), other=0.0)


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
def mlp_forward(N, FIRST, FIRST_BIAS, SECOND, SECOND_BIAS, RESIDUAL, Y, COUNT, I, BIAS: tl.constexpr,
                ADD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Y [COUNT, D] <- the MLP of N [COUNT, D], with ADD plus RESIDUAL [COUNT, D]. Grid (COUNT / ROWS,)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = factor(load_rows(N, i, COUNT, D, DP))
    y = tl.zeros([ROWS, DP], tl.float32)
    for start in range(0, I, BLOCK):
        j = start + tl.arange(0, BLOCK)
        h = tl.dot(n, tl.trans(load_first(FIRST, j, I, D, DP)))
        h += tl.load(FIRST_BIAS + j, mask=j < I, other=0.0).to(tl.float32)[None, :]
        a = (h * gate(h)).to(N.dtype.element_ty)
        y = tl.dot(factor(a), tl.trans(load_second(SECOND, j, I, D, DP)), y)
    d = tl.arange(0, DP)
    if BIAS:
        y += tl.load(SECOND_BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += load_rows(RESIDUAL, i, COUNT, D, DP).to(tl.float32)
    tl.store(Y + i.to(tl.int64)[:, None] * D + d[None, :], y.to(Y.dtype.element_ty),
             mask=(i < COUNT)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["COUNT"])
def mlp_backward(N, DY, FIRST, FIRST_BIAS, SECOND, A, DH, DN, G, SUMS, COUNT, I, LOWER: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """From DY [COUNT, D]: A [COUNT, I] <- GELU of the inner channels, DH [COUNT, I] <- the gradient at these, DN
    [COUNT, D] <- that at N, with LOWER G [COUNT, D] <- DY, SUMS [programs, I + D] <- the sums of DH and of DY over the
    program's rows. Grid (COUNT / ROWS,)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    at, ok = i.to(tl.int64)[:, None] * D + d[None, :], (i < COUNT)[:, None] & (d < D)[None, :]
    sums = SUMS + tl.program_id(0) * (I + D)
    dy = tl.load(DY + at, mask=ok, other=0.0)
    tl.store(sums + I + d, tl.sum(dy.to(tl.float32), 0), mask=d < D)
    dy = dy.to(N.dtype.element_ty)
    if LOWER:
        tl.store(G + at, dy, mask=ok)
    dy = factor(dy)
    n = factor(load_rows(N, i, COUNT, D, DP))
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
    tl.store(DN + at, dn.to(DN.dtype.element_ty), mask=ok)


@torch.library.custom_op("hyena::mlp", mutates_args=("y",))
def forward(n: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor | None,
            residual: Tensor | None, y: Tensor) -> None:
    """y <- the MLP of n, plus residual, all [n, D]; y is contiguous, n and the weights are of half precision."""
    count, width = n.shape
    sizes, options = _plan(n, backward=False)
    if count:
        with torch.cuda.device_of(n):
            mlp_forward[(triton.cdiv(count, sizes["ROWS"]),)](
                n.contiguous(), first.contiguous(), first_bias.contiguous(), second.contiguous(),
                first_bias if second_bias is None else second_bias.contiguous(),
                n if residual is None else residual.contiguous(), y, count, len(first), BIAS=second_bias is not None,
                ADD=residual is not None, D=width, **sizes, **options)


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


def _plan(n: Tensor, *, backward: bool) -> tuple[Options, Options]:
    """Constants and options of a launch, by what spills fewest registers. With two stages the weights of the next block
    of inner channels come while those of this one are multiplied; a backward pass of few channels has two programs at a
    time for that, because its compiler makes such products wait for each other."""
    padded, wide = triton.next_power_of_2(max(16, n.shape[1])), wide_memory(n.device)
    if wide and (padded > 128 or not backward):
        rows, block, warps, stages = 128, 32 if backward else 64, 8, 2
    elif padded > 128:
        rows, block, warps, stages = (32, 32, 4, 1) if backward else (64, 32, 8, 1)
    else:
        rows, block, warps, stages = 64, 32, 4, 1
    return {"DP": padded, "ROWS": rows, "BLOCK": block}, {"num_warps": warps, "num_stages": stages}


forward.register_fake(lambda *_: None)
backward.register_fake(lambda _n, _dy, first, *_: first.new_empty(sum(first.shape), dtype=torch.float32))
declare_cost("hyena::mlp", lambda n, first, _first_bias, _second, _second_bias, residual, y: Cost(
    n.nbytes + y.nbytes + (0 if residual is None else residual.nbytes), 4.0 * n.numel() * len(first), 1))
declare_cost("hyena::mlp_backward", lambda n, dy, first, _first_bias, _second, a, dh, dn, g: Cost(
    n.nbytes + dy.nbytes + a.nbytes + dh.nbytes + dn.nbytes + (0 if g is None else g.nbytes)
    + 4 * triton.cdiv(len(n), _plan(n, backward=True)[0]["ROWS"]) * sum(first.shape), 6.0 * n.numel() * len(first), 2))
