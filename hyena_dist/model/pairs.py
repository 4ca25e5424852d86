"""An answer for each pair of bins of a sequence, as a contact map has: of what the two bins have in common, of each
one, and of how far they are apart. It does not depend on which of the two comes first.

The bins, which are few, are known to every rank; their pairs are shared out over the context ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.model.binned import BinMeans
from hyena_dist.model.layers import whole
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Axis

WIDTH = 64
"""Channels of a pair."""


def pairs_of(bins: int, diagonals: int, context: Axis) -> tuple[Tensor, Tensor]:
    """The pairs i, j of bins, j - i at least `diagonals`, that are this context rank's: int64 [p] each."""
    first, second = torch.triu_indices(bins, bins, diagonals)[:, context.rank :: context.size]
    return first, second


class PairHead(nn.Module):
    """[n, B, D] -> what a bin gives to pairs, and from pairs to a number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bins = nn.Linear(channels, 2 * WIDTH)
        self.distance = nn.Linear(1, WIDTH, bias=False)
        self.pair = nn.Linear(WIDTH, 1)


class PairModel(BinMeans):
    """[B, l] -> [B, p] of this context rank's p pairs, the same on every tensor rank. Of the loss that follows each
    context rank counts that of its pairs.

    Args:
        diagonals: as of `pairs_of`.
    """

    def __init__(self, backbone: HyenaModel, *, bin_size: int, diagonals: int, seed: int) -> None:
        super().__init__(backbone, PairHead(backbone.config.hidden_size), bin_size=bin_size, seed=seed)
        self.diagonals = diagonals

    def forward(self, input_ids: Tensor, _lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """Numbers, in float32 at least; those of bins behind the end of a sequence mean nothing.

        Args:
            input_ids: int64 [B, l], this context rank's slice.
        """
        hidden = self.hidden(input_ids, dropout_key)
        own, count = self.own_bins(len(hidden)), self.bins(input_ids.shape[1])
        weight, bias = (whole(part, self.sequence) for part in (self.head.bins.weight, self.head.bins.bias))
        mine = F.linear(self.means(hidden), weight, bias)
        places = torch.arange(own.start, own.stop, device=hidden.device)
        bins = self.sum_for_all(mine.new_zeros(count, *mine.shape[1:]).index_copy(0, places, mine))
        first, second = (part.to(hidden.device) for part in pairs_of(count, self.diagonals, self.context))
        alone, together = bins.chunk(2, -1)
        apart = self.head.distance(torch.log1p((second - first).to(hidden.dtype))[:, None, None])
        found = F.gelu(alone[first] + alone[second] + together[first] * together[second] + apart)
        return self.head.pair(found)[..., 0].transpose(0, 1)
