"""GELU by tanh in half the passes: forward, and backward with the gradient of the bias before it.

    gelu(h) = h s,   s = sigmoid(h (A + B h^2)),   gelu' = s + h s (1 - s) (A + 3 B h^2)
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost

FLAT = 2048
ROWS, COLUMNS = 16, 128
PROGRAMS = 512
"""About the most of a backward pass, each of which sums the bias' gradient of its rows; as `norm.PROGRAMS`."""

_A = tl.constexpr(2 * math.sqrt(2 / math.pi))
_B = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))


@triton.jit
def gate(h):
    """[...] -> s. The exponential of a large number is infinite, and s then 0."""
    return 1.0 / (1.0 + tl.exp(-h * (_A + _B * h * h)))


@triton.jit
def slope(h, s):
    """gelu'(h)."""
    return s + h * s * (1.0 - s) * (_A + (3.0 * _B) * h * h)


@triton.jit
def gelu_forward(H, OUT, COUNT, BLOCK: tl.constexpr):
    """OUT <- gelu(H), COUNT elements: loads are wide where that is a multiple of 16. Grid (COUNT / BLOCK,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(H + i, mask=i < COUNT, other=0.0).to(tl.float32)
    tl.store(OUT + i, (h * gate(h)).to(OUT.dtype.element_ty), mask=i < COUNT)


@triton.jit(do_not_specialize=["COUNT"])
def gelu_backward(H, DA, A, SUMS, COUNT, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A [COUNT, WIDTH] <- gelu(H); DA <- the gradient at H from that at A; SUMS [programs, WIDTH]: what the program's
    rows add to its sum over all rows. Grid (programs, WIDTH / COLUMNS)."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(COUNT, ROWS), tl.num_programs(0)):
        i = block * ROWS + tl.arange(0, ROWS)[:, None]
        at = i.to(tl.int64) * WIDTH + column[None, :]
        ok = (i < COUNT) & (column < WIDTH)[None, :]
        h = tl.load(H + at, mask=ok, other=0.0).to(tl.float32)
        da = tl.load(DA + at, mask=ok, other=0.0).to(tl.float32)
        s = gate(h)
        dh = da * slope(h, s)
        total += dh
        tl.store(A + at, (h * s).to(A.dtype.element_ty), mask=ok)
        tl.store(DA + at, dh.to(DA.dtype.element_ty), mask=ok)
    tl.store(SUMS + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


@torch.library.custom_op("hyena::gelu", mutates_args=("out",))
def forward(h: Tensor, out: Tensor) -> None:
    """out <- gelu(h), both contiguous."""
    if h.numel():
        with torch.cuda.device_of(h):
            gelu_forward[(triton.cdiv(h.numel(), FLAT),)](h, out, h.numel(), BLOCK=FLAT)


@torch.library.custom_op("hyena::gelu_backward", mutates_args=("da", "a"))
def backward(h: Tensor, da: Tensor, a: Tensor) -> Tensor:
    """a <- gelu(h), and da <- the gradient at h from da at a, all [n, I] and contiguous; returns its sum over n, [I] in
    float32."""
    count, width = h.shape
    programs, blocks = _grid(count, width)
    sums = torch.empty(programs, width, dtype=torch.float32, device=h.device)
    if h.numel():
        with torch.cuda.device_of(h):
            gelu_backward[(programs, blocks)](h, da, a, sums, count, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return sums.sum(0)


def _grid(count: int, width: int) -> tuple[int, int]:
    blocks = triton.cdiv(width, COLUMNS)
    return min(max(1, PROGRAMS // max(1, blocks)), triton.cdiv(count, ROWS)), blocks


forward.register_fake(lambda *_: None)
backward.register_fake(lambda h, *_: h.new_empty(h.shape[1], dtype=torch.float32))
declare_cost("hyena::gelu", lambda h, out: Cost(h.nbytes + out.nbytes, 0, 1))
declare_cost("hyena::gelu_backward", lambda h, da, a: Cost(
    h.nbytes + 2 * da.nbytes + a.nbytes + 4 * _grid(*h.shape)[0] * h.shape[1], 0, 2))
