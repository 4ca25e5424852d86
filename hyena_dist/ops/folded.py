"""The short convolution folded into the projection before it, one product of K times its depth:

    short_conv(W n + b)[t] = sum_k (w_k W) n[t - (K-1) + k] + w_k b [it is after the start] + short_bias

On a GPU in half precision the product is the cheaper: elementwise passes over shifted rows run at a third of its
bandwidth, and the backward pass needs no second short convolution. What is rounded to half precision is w_k W, where
without folding it is W and the projection.

Legend: l tokens, B batch, D channels of the residual stream, O = (N + 1) C projected ones, K taps. A token's row has
W = D + PADDING columns: its channels, a 1 that the biases multiply, and zeros (`ops.linear.with_bias`).
"""

from typing import Any

import torch
from torch import Tensor

from hyena_dist.ops.chunking import row_chunks
from hyena_dist.ops.linear import PADDING, with_bias
from hyena_dist.ops.norm import NormArguments, NormTape
from hyena_dist.ops.precision import accumulate_product, compute_dtype


def folds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the short convolution is folded where products are in this dtype."""
    return device.type != "cpu" and dtype.itemsize == 2


def fold(in_weight: Tensor, in_bias: Tensor, short_weight: Tensor, short_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """in_weight [O, D], in_bias [O], short_weight [O, K], short_bias [O] -> [O, K, W] in `dtype`."""
    width = in_weight.shape[1]
    folded = torch.empty(*short_weight.shape, width + PADDING, dtype=dtype, device=in_weight.device)
    torch.mul(short_weight[..., None], with_bias(in_weight, in_bias)[:, None], out=folded)
    folded[:, -1, width].add_(short_bias)
    return folded


def fold_backward(dfolded: Tensor, in_weight: Tensor, in_bias: Tensor, short_weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients at the four arguments of `fold` from that at its result."""
    width = in_weight.shape[1]
    din = torch.bmm(short_weight[:, None], dfolded)[:, 0]
    dshort = torch.bmm(dfolded, with_bias(in_weight, in_bias)[..., None])[..., 0]
    return din[:, :width], din[:, width], dshort, dfolded[:, -1, width]


def folded_linear(x: Tensor, folded: Tensor, norm: NormArguments) -> Tensor:
    """x [l, B, D], folded [O, K, W] in the dtype of the product -> short_conv(in_proj(norm(x))), [B, O, l]; outside
    autograd and with autocast off."""
    length, batch, _ = x.shape
    tape, weight = NormTape(norm, compute_dtype(x), compute_dtype(x)), folded.flatten(1)
    q = torch.empty(batch, len(weight), length, dtype=weight.dtype, device=x.device)
    windows = _Windows(folded)
    for rows, tokens in row_chunks(batch, length, weight.shape[1], x.device):
        wide = windows(tape.forward(x[tokens, rows]), first=tokens.start == 0)
        torch.bmm(weight.expand(len(wide), -1, -1), wide.transpose(1, 2), out=q[rows, :, tokens])
    return q


def folded_linear_backward(dq: Tensor, x: Tensor, folded: Tensor, norm: NormArguments,
                          dresidual: Tensor | None = None) -> tuple[Any, ...]:
    """Gradients of `folded_linear` at x and at folded (in the dtype of computation), and what `NormTape.gradients`
    returns for the norm, given the gradient dq at its result, [B, O, l]. `dresidual` [l, B, D] is added to the gradient
    at x."""
    length, batch, width = x.shape
    (_, taps, columns), dtype = folded.shape, compute_dtype(x)
    tape, weight, windows = NormTape(norm, dtype, dtype), folded.flatten(1), _Windows(folded)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dfolded = None
    for rows, tokens in row_chunks(batch, length, weight.shape[1], x.device):
        wide = windows(tape.forward(x[tokens, rows]), first=tokens.start == 0)
        count, size, _ = wide.shape
        dq_rows = dq[rows, :, tokens].transpose(0, 1).flatten(1)
        dfolded = accumulate_product(dfolded, dq_rows, wide.flatten(0, 1), dtype)
        # A token is in the windows of the K - 1 tokens after it too.
        seen_by = dq[rows, :, tokens.start : tokens.stop + taps - 1]
        dwide = torch.bmm(seen_by.transpose(1, 2), weight.expand(count, -1, -1)).unflatten(2, (taps, columns))
        dwide = dwide.transpose(0, 1)
        dn = dwide[:size, :, -1, :width].to(dtype, memory_format=torch.contiguous_format)
        for back in range(1, taps):
            later = dwide[back : back + size, :, taps - 1 - back, :width]
            dn[: len(later)].add_(later)
        tape.backward(dn, dx[tokens, rows], None if dresidual is None else dresidual[tokens, rows])
    assert dfolded is not None
    return dx, dfolded.view(folded.shape), *tape.gradients()


class _Windows:
    """Of chunks of a row's tokens, one after the other, the rows that the folded product reads: of each token itself
    and the K - 1 before it, which are zeros before the start."""

    def __init__(self, folded: Tensor) -> None:
        _, self._taps, self._columns = folded.shape
        self._dtype, self._left = folded.dtype, torch.empty(0)

    def __call__(self, n: Tensor, *, first: bool) -> Tensor:
        """[n, r, D] -> [r, n, K W]."""
        size, rows, width = n.shape
        reach = self._taps - 1
        line = torch.zeros(rows, reach + size, self._columns, dtype=self._dtype, device=n.device)
        line[:, reach:, :width] = n.transpose(0, 1)
        line[:, reach:, width].fill_(1)
        if not first:
            line[:, :reach] = self._left
        self._left = line[:, size:]
        strides = line.stride(0), self._columns, 1  # a window overlaps the next
        return line.as_strided((rows, size, self._taps * self._columns), strides).contiguous()
