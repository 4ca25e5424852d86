"""The depthwise causal short convolution: y[b, c, t] = bias[c] + sum_j weight[c, K-1-j] x[b, c, t-j].

Shapes: x, y [B, C, L], weight [C, K] (last tap on the present token, as torch's Conv1d), bias [C]. Shifted
multiply-adds on chunks of channels: several times as fast as torch's depthwise conv1d on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.ops.precision import compute_dtype, without_autocast
from hyena_dist.ops.workspace import Workspace

Rows = slice | tuple[int | slice, ...]


def short_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor | None = None) -> Tensor:
    """By torch's depthwise conv1d; the tokens on the left are `halo` [B, C, K-1], or zeros."""
    dtype = compute_dtype(x, weight)
    with without_autocast(x):
        padded = F.pad(x, (weight.shape[1] - 1, 0)) if halo is None else torch.cat([halo, x], dim=2)
        return F.conv1d(padded.to(dtype), weight.to(dtype)[:, None], bias.to(dtype), groups=len(weight)).to(x.dtype)


class ShortConvTape:
    """The short convolution of chunks of channels and its gradients, collected over the chunks.

    weight [*C, K] and bias [*C] may have their channels in several dimensions; `rows` says which of them a chunk
    x [B, *c, L] is. Chunks are in the dtype of computation. With `work`, what `forward` returns is good until the next
    call of either.

    Args:
        positions: [B, L], the place of every token in its segment, before whose start nothing is read; None: each row
            is one segment, or goes on from its halo.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, work: Workspace | None = None,
                 positions: Tensor | None = None) -> None:
        self.dtype = dtype
        self._taps = weight.to(dtype).flip(-1)  # [..., j] multiplies the token j back
        self._bias, self._results_in_work = bias.to(dtype)[..., None], work is not None
        self._work = work or Workspace(dtype, weight.device)
        self._inside = None if positions is None else [(positions >= j).to(dtype) for j in range(weight.shape[-1])]
        self.dweight, self.dbias = torch.zeros_like(weight), torch.zeros_like(bias)

    def forward(self, x: Tensor, rows: Rows, halo: Tensor | None = None) -> Tensor:
        taps = self._taps[rows].unsqueeze(-2).unbind(-1)
        out = self._work("short", *x.shape) if self._results_in_work else None
        y = torch.addcmul(self._bias[rows], x, taps[0], out=out)
        for j in self._reached(x):
            y[..., j:].addcmul_(self._only_inside(x[..., :-j], j, slice(j, None)), taps[j])
            if halo is not None:
                y[..., :j].addcmul_(self._only_inside(halo[..., -j:], j, slice(j)), taps[j])
        return y

    def backward(self, dy: Tensor, x: Tensor, rows: Rows, dx: Tensor, halo: Tensor | None = None) -> Tensor:
        """Writes the gradient at x to dx, which may be the memory of x, and returns that at the halo, empty without
        one."""
        taps = self._taps[rows].unsqueeze(-2).unbind(-1)
        dhalo = torch.zeros(0) if halo is None else torch.zeros_like(halo)
        dtaps = self.dweight[rows].unbind(-1)[::-1]
        self.dbias[rows] = _over_tokens(dy)
        dtaps[0].copy_(self._sum_of_products(dy, x))
        for j in self._reached(x):
            dtaps[j].copy_(self._sum_of_products(self._only_inside(dy[..., j:], j, slice(j, None)), x[..., :-j]))
            if halo is not None:
                first = self._only_inside(dy[..., :j], j, slice(j))
                dhalo[..., -j:].addcmul_(first, taps[j])
                dtaps[j].add_(_over_tokens(first * halo[..., -j:]))
        found = torch.mul(dy, taps[0], out=dx if dx.dtype == dy.dtype else None)
        for j in self._reached(dy):
            found[..., :-j].addcmul_(self._only_inside(dy[..., j:], j, slice(j, None)), taps[j])
        if found is not dx:
            dx.copy_(found)
        return dhalo

    def _only_inside(self, x: Tensor, back: int, tokens: slice) -> Tensor:
        """x [B, *c, n], what goes from each of the n tokens to the one so many back or comes from it, 0 where a border
        is between them.

        Args:
            tokens: which of the row they are.
        """
        if self._inside is None:
            return x
        inside = self._inside[back][:, tokens].reshape(len(x), *[1] * (x.dim() - 2), -1)
        return torch.mul(x, inside, out=self._work("inside", *x.shape))

    def _sum_of_products(self, a: Tensor, b: Tensor) -> Tensor:
        return _over_tokens(torch.mul(a, b, out=self._work("short", *a.shape)))

    def _reached(self, x: Tensor) -> range:
        return range(1, min(self._taps.shape[-1], x.shape[-1]))


def _over_tokens(x: Tensor) -> Tensor:
    """[B, *c, L] -> [*c]"""
    return x.sum((0, -1))
