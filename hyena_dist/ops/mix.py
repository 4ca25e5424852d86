"""The part of the Hyena operator between its two matrix products, which is called `mix`, and what a backend of it is.

    x0 | x1 | ... | v = short_conv(p)
    u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)

Legend: p [B, (N + 1) C, l] -> u [B, C, l]; B batch, C channels, l tokens, N order, K taps, (*) causal convolution.

Segments are sequences that stand one after the other in a row of tokens. Their borders are given as offsets,
0 < ... < l, the same in every row of the batch, with both ends: (0, 100, 250) are 100 and 150 tokens. Neither the short
nor a long convolution crosses a border. None is one segment.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hyena_dist.ops.long_conv import causal_conv_reference
from hyena_dist.ops.short_conv import short_conv_reference

Segments = Sequence[int] | None


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

    def refusal(self, asked: Asked, /) -> str | None:
        """Why it cannot compute this; None: it can."""

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments, /) -> tuple[Tensor, list[Tensor]]:
        """From p to u, in the dtype of p, and what the gradients need besides p and the weights."""

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments, kept: list[Tensor],
                     /) -> MixWeights:
        """The gradients at the weights from that at u, `dy` [B, C, l], which is contiguous as p is. Besides, the
        gradient at p is written over p, and u over dy."""


def mix_reference(p: Tensor, weights: MixWeights, segments: Segments = None) -> Tensor:
    """The same function by the slow references, through autograd, segment by segment."""
    order, pieces = len(weights.filters) + 1, []
    for tokens in spans(segments, p.shape[2]):
        q = p[..., tokens]
        if weights.short_weight is not None and weights.short_bias is not None:
            q = short_conv_reference(q, weights.short_weight, weights.short_bias)
        *gates, u = q.chunk(order + 1, dim=1)
        u = u * gates.pop()
        for h, b in zip(weights.filters, weights.bias, strict=True):
            u = causal_conv_reference(u, h[:, : u.shape[2]], b, gates.pop())
        pieces.append(u)
    return torch.cat(pieces, dim=2)


def spans(segments: Segments, length: int) -> list[slice]:
    """The tokens of every segment.

    Raises:
        ValueError: offsets that do not begin with 0, do not grow, or do not end with the length.
    """
    if segments is None:
        return [slice(0, length)]
    offsets = list(segments)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != length or any(a >= b for a, b in pairwise(offsets)):
        raise ValueError(f"segments of {length} tokens must be offsets that grow from 0 to {length}, got {offsets}")
    return [slice(start, stop) for start, stop in pairwise(offsets)]


def check_filters(filters: Tensor, segments: Segments, length: int) -> None:
    """Refuse filters with fewer lags than the longest segment has tokens.

    Raises:
        ValueError: with both numbers; or as `spans`.
    """
    longest = max(tokens.stop - tokens.start for tokens in spans(segments, length))
    if filters.shape[-1] < longest:
        raise ValueError(f"the longest segment has {longest} tokens, the filters have only {filters.shape[-1]} lags")
