"""The part of the Hyena operator between its two matrix products, which is called `mix`, and what a backend of it is.

    x0 | x1 | ... | v = short_conv(p)
    u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)

Legend: p [B, (N + 1) C, l] -> u [B, C, l]; B batch, C channels, l tokens, N order, K taps, (*) causal convolution.

Where the rows of a batch are made of segments (`ops.segments`), neither the short nor a long convolution crosses a
border between two of them.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hyena_dist.ops.long_conv import causal_conv_reference
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.short_conv import short_conv_reference


class MixWeights(NamedTuple):
    """short_weight [(N + 1) C, K], short_bias [(N + 1) C], filters h [N - 1, C, l] (at least as many lags as the
    longest segment has tokens), bias [N - 1, C]; or the gradients at them. The first two are None where p is what the
    short convolution gave."""

    short_weight: Tensor | None
    short_bias: Tensor | None
    filters: Tensor
    bias: Tensor


class Asked(NamedTuple):
    """What a backend is asked to compute."""

    device: torch.device
    dtype: torch.dtype
    """Of p; float64 where the filters are."""
    order: int
    taps: int
    length: int
    segmented: bool = False


class Backend(Protocol):
    """One way to compute `mix` and its gradients: an object, or a module."""

    keeps_spectra: bool
    """Whether `mix` keeps what stands for the filters: `mix_backward` may then use of them the shape alone."""

    def refusal(self, asked: Asked, /) -> str | None:
        """Why it cannot compute this; None: it can."""

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments | None, /) -> tuple[Tensor, list[Tensor]]:
        """From p to u, in the dtype of p, and what the gradients need besides p and the weights."""

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                     kept: list[Tensor], /) -> MixWeights:
        """The gradients at the weights from that at u, `dy` [B, C, l], which is contiguous as p is. Besides, the
        gradient at p is written over p, and u over dy."""


def mix_reference(p: Tensor, weights: MixWeights, segments: Segments | None = None) -> Tensor:
    """The same function by the slow references, through autograd, segment by segment."""
    rows = [(0, p.shape[2])] * len(p) if segments is None else segments.rows
    return torch.cat([torch.cat([_one_segment(row[None, :, start:stop], weights) for start, stop in pairwise(edges)],
                                dim=2) for row, edges in zip(p, rows, strict=True)])


def _one_segment(p: Tensor, weights: MixWeights) -> Tensor:
    if weights.short_weight is not None and weights.short_bias is not None:
        p = short_conv_reference(p, weights.short_weight, weights.short_bias)
    *gates, u = p.chunk(len(weights.filters) + 2, dim=1)
    u = u * gates.pop()
    for h, b in zip(weights.filters, weights.bias, strict=True):
        u = causal_conv_reference(u, h[:, : u.shape[2]], b, gates.pop())
    return u


def check_filters(filters: Tensor, segments: Segments | None, length: int) -> None:
    """Refuse filters with fewer lags than the longest segment has tokens.

    Raises:
        ValueError: with both numbers.
    """
    longest = length if segments is None else segments.longest
    if filters.shape[-1] < longest:
        raise ValueError(f"the longest segment has {longest} tokens, the filters have only {filters.shape[-1]} lags")
