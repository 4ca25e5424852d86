"""The causal convolution of a sequence that is made one token at a time, exact, in O(log^2 n) operations a token.

    y[t] = sum_{s <= t} h[t - s] u[s],   where u[t] is known only after y[t - 1] was used

The triangle of pairs (input, later output) is tiled by squares: after token i - 1, with b the largest power of two
that divides i, the inputs i - b .. i - 1 are added to the outputs i .. i + b - 1 at once, by one transform of length
2 b. Each pair lies in exactly one square (FutureFill, Agarwal et al. 2024; Flash Inference, Oncescu et al. 2024). What
was there before the first token, a prompt, is given as what it adds to every later output.

Legend: B sequences, R rows (channels of all filters), n tokens that are to be made, b tokens of a square's side.
"""

import torch
from torch import Tensor

from hyena_dist.ops.chunking import chunks

DIRECT = 16
"""Longest side of a square that is summed directly: below this a transform costs more than it spares."""
KEPT = 4096
"""Longest side of a square whose filter's spectrum is kept, 8 bytes a row for each token of the side and of all shorter
ones. The spectra of longer squares, which are rare, are computed each time."""


def online_conv_reference(u: Tensor, h: Tensor, carried: Tensor) -> Tensor:
    """The same sums directly: u [B, R, n], h [R, n], carried [B, R, n] -> [B, R, n], in O(n) a token."""
    found = [carried[..., t] + (u[..., : t + 1] * h[:, : t + 1].flip(-1)).sum(-1) for t in range(u.shape[-1])]
    return torch.stack(found, dim=-1)


class OnlineConvolution:
    """The sums of n tokens, one token after the other: at each token `step` once for every row, then `advance`.

    Args:
        filters: h [R, n], in the dtype of computation; what multiplies the present token's own value is h[:, 0].
        carried: [B, R, n], what an earlier part of the sequences adds to each output. It is written over.
    """

    def __init__(self, filters: Tensor, carried: Tensor) -> None:
        self._filters, self._sums, self._token = filters, carried, 0
        self._values = torch.zeros_like(carried)
        self._now, self._next = filters[:, 0].contiguous(), filters[:, 1:2].squeeze(1).contiguous()
        self._kept: dict[int, Tensor] = {}

    def step(self, rows: slice, value: Tensor) -> Tensor:
        """The present token's value of some rows, [B, rows] -> the convolution there, [B, rows]."""
        self._values.select(2, self._token)[:, rows].copy_(value)
        return torch.addcmul(self._sums.select(2, self._token)[:, rows], self._now[rows], value)

    def advance(self) -> None:
        """Every row has its value: go on to the next token."""
        self._token += 1
        i, count = self._token, self._filters.shape[1]
        if i >= count:
            return
        side = i & -i
        reached = min(side, count - i)
        if side == 1:
            self._sums.select(2, i).addcmul_(self._values.select(2, i - 1), self._next)
        elif side <= DIRECT:
            block = self._values[..., i - side : i].transpose(0, 1)
            added = torch.bmm(block, self._square(side)).transpose(0, 1)
            self._sums[..., i : i + reached] += added[..., :reached]
        else:
            for part in chunks(len(self._filters), 2 * side * len(self._sums), self._sums.device):
                block = torch.fft.rfft(self._values[:, part, i - side : i], n=2 * side)
                added = torch.fft.irfft(block.mul_(self._spectrum(side, part)), n=2 * side)[..., side - 1 :]
                self._sums[:, part, i : i + reached] += added[..., :reached]

    def _lags(self, side: int, part: slice) -> Tensor:
        """h[1] .. h[2 side - 1] of some rows, zeros where no output needs them: [rows, 2 side - 1]."""
        lags = self._filters[part, 1 : 2 * side]
        return torch.nn.functional.pad(lags, (0, 2 * side - 1 - lags.shape[1]))

    def _square(self, side: int) -> Tensor:
        """What each of `side` values adds to each of as many outputs behind them: [R, side, side]."""
        if side not in self._kept:
            lags = self._lags(side, slice(None)).unfold(1, side, 1)  # [R, s, t]: lag 1 + s + t
            self._kept[side] = lags.flip(1).contiguous()  # the last value is the nearest
        return self._kept[side]

    def _spectrum(self, side: int, part: slice) -> Tensor:
        """Of `_lags`: [rows, side + 1]."""
        if side > KEPT:
            return torch.fft.rfft(self._lags(side, part), n=2 * side)
        if side not in self._kept:
            self._kept[side] = torch.fft.rfft(self._lags(side, slice(None)), n=2 * side)
        return self._kept[side][part]
