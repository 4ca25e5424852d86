"""The product after the Hyena operator, weight y + bias + residual, as one kernel for each direction. It reads the
operator's result where it lies, channels before tokens, and the residual stream in the dtype that this has.

The backward pass reads the gradient once, for the gradient at y, for the sum that is the bias' gradient, and for the
gradient in half precision that a product of torch multiplies to the weight's gradient.

Legend: l tokens, B batch, C channels of y, D channels of the result, DP of them with padding. A program has TOKENS
tokens of one row of the batch; programs are numbered row by row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.triton.mlp import factor, load_second
from hyena_dist.ops.triton.plans import Options


@triton.jit
def place_of_program(B, L, TOKENS: tl.constexpr):
    """The program's row of the batch as int64, its tokens [TOKENS], and the rows of [l, B, D] that these are."""
    tiles = tl.cdiv(L, TOKENS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    return b, t, t.to(tl.int64) * B + b


@triton.jit
def store_result(out, d, rows, ok, BIAS, RESIDUAL, OUT, SUM: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr):
    """Channels d of OUT [L, B, D] <- out [TOKENS, channels], with SUM plus BIAS, with ADD plus RESIDUAL."""
    at, inside = rows[:, None] * D + d[None, :], ok[:, None] & (d < D)[None, :]
    if SUM:
        out += tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ADD:
        out += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def project_forward(Y, WEIGHT, BIAS, RESIDUAL, OUT, B, C, L, SUM: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr,
                    DP: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """OUT [L, B, D] <- WEIGHT [D, C] times Y [B, C, L], with SUM plus BIAS [D], with ADD plus RESIDUAL [L, B, D]. Grid
    (B * L / TOKENS,)."""
    b, t, rows = place_of_program(B, L, TOKENS)
    d, out = tl.arange(0, DP), tl.zeros([TOKENS, DP], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        y = tl.load(Y + (b * C + c)[:, None] * L + t[None, :], mask=(c < C)[:, None] & (t < L)[None, :], other=0.0)
        out = tl.dot(tl.trans(factor(y)), tl.trans(load_second(WEIGHT, c, d, C, D)), out)
    # One half of the channels after the other: registers cannot hold the product and a residual of its size.
    HALF: tl.constexpr = DP // 2
    left, right = out.reshape(TOKENS, 2, HALF).permute(0, 2, 1).split()
    store_result(left, tl.arange(0, HALF), rows, t < L, BIAS, RESIDUAL, OUT, SUM, ADD, D)
    store_result(right, HALF + tl.arange(0, HALF), rows, t < L, BIAS, RESIDUAL, OUT, SUM, ADD, D)


@triton.jit(do_not_specialize=["B"])
def project_backward(DOUT, WEIGHT, DY, G, SUMS, B, C, L, LOWER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                     TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """From DOUT [L, B, D]: DY [B, C, L] <- the gradient at Y, with LOWER G [L, B, D] <- DOUT, SUMS [programs, D] <- the
    sum of DOUT over the program's tokens. Grid (B * L / TOKENS,)."""
    b, t, rows = place_of_program(B, L, TOKENS)
    d = tl.arange(0, DP)
    at, ok = rows[:, None] * D + d[None, :], (t < L)[:, None] & (d < D)[None, :]
    dout = tl.load(DOUT + at, mask=ok, other=0.0)
    tl.store(SUMS + tl.program_id(0).to(tl.int64) * D + d, tl.sum(dout.to(tl.float32), 0), mask=d < D)
    dout = dout.to(DY.dtype.element_ty)
    if LOWER:
        tl.store(G + at, dout, mask=ok)
    dout = factor(dout)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy = tl.trans(tl.dot(dout, load_second(WEIGHT, c, d, C, D)))
        tl.store(DY + (b * C + c)[:, None] * L + t[None, :], dy.to(DY.dtype.element_ty),
                 mask=(c < C)[:, None] & (t < L)[None, :])


@torch.library.custom_op("hyena::project", mutates_args=("out",))
def forward(y: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """out [l, B, D] <- weight [D, C] times y [B, C, l], both of half precision, plus bias [D] plus residual [l, B, D];
    out is contiguous."""
    batch, channels, length = y.shape
    sizes, options = _plan(weight, backward=False)
    if out.numel():
        with torch.cuda.device_of(y):
            project_forward[(_programs(out, sizes),)](
                y.contiguous(), weight.contiguous(), weight if bias is None else bias.contiguous(),
                out if residual is None else residual.contiguous(), out, batch, channels, length,
                SUM=bias is not None, ADD=residual is not None, D=len(weight), **sizes, **options)


@torch.library.custom_op("hyena::project_backward", mutates_args=("dy", "g"))
def backward(dout: Tensor, weight: Tensor, dy: Tensor, g: Tensor | None) -> Tensor:
    """From dout [l, B, D]: dy [B, C, l] <- the gradient at y, g [l, B, D] <- dout in its own dtype, both contiguous and
    of half precision, as is weight [D, C]; returns the sum of dout over l and B, [D] in float32."""
    batch, channels, length = dy.shape
    sizes, options = _plan(weight, backward=True)
    programs = _programs(dout, sizes)
    sums = torch.empty(programs, len(weight), dtype=torch.float32, device=dout.device)
    if programs:
        with torch.cuda.device_of(dout):
            project_backward[(programs,)](dout.contiguous(), weight.contiguous(), dy, dy if g is None else g, sums,
                                          batch, channels, length, LOWER=g is not None, D=len(weight), **sizes,
                                          **options)
    return sums.sum(0)


def _programs(stream: Tensor, sizes: Options) -> int:
    """For a tensor [l, B, D]."""
    length, batch, _ = stream.shape
    return triton.cdiv(length, sizes["TOKENS"]) * batch


def _plan(weight: Tensor, *, backward: bool) -> tuple[Options, Options]:
    """Constants and options of a launch. With these no kernel spills registers, a multiprocessor of a Hopper has two
    programs at a time, so that one can load while the other multiplies, and every device has the shared memory. With
    two stages the next block of channels comes while one is multiplied."""
    padded = triton.next_power_of_2(max(16, len(weight)))
    return ({"DP": padded, "TOKENS": 64, "BLOCK": 32 if backward else 64},
            {"num_warps": 8 if padded > 128 else 4, "num_stages": 2})


forward.register_fake(lambda *_: None)
backward.register_fake(lambda _dout, weight, *_: weight.new_empty(len(weight), dtype=torch.float32))
declare_cost("hyena::project", lambda y, weight, _bias, residual, out: Cost(
    y.nbytes + out.nbytes + (0 if residual is None else residual.nbytes), 2.0 * y.numel() * len(weight), 1))
declare_cost("hyena::project_backward", lambda dout, weight, dy, g: Cost(
    dout.nbytes + dy.nbytes + (0 if g is None else g.nbytes)
    + 4 * _programs(dout, _plan(weight, backward=True)[0]) * len(weight), 2.0 * dy.numel() * len(weight), 2))
