"""Answers for the bins of a sequence: the mean of each bin's hidden states, and a linear head. A bin of one token gives
an answer for each base.

A rank reduces the tokens that it holds. Only bins that lie across the border of two ranks' slices are summed over the
ranks, and each of those is then the rank's in whose slice it begins.
"""

import torch
from torch import Tensor, nn

from hyena_dist.model.headed import BIAS, WEIGHT, HeadedModel
from hyena_dist.model.layers import whole
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey


class BinMeans(HeadedModel):
    """The part of a model that has bins; what its head makes of them is the subclasses'.

    Args:
        bin_size: tokens of a bin; the first begins with the sequence.
    """

    def __init__(self, backbone: HyenaModel, head: nn.Module, *, bin_size: int, seed: int) -> None:
        placements = {f"head.{name}": BIAS if name.endswith("bias") else WEIGHT for name, _ in head.named_parameters()}
        super().__init__(backbone, head, placements, seed=seed)
        self.bin_size = bin_size

    def means(self, hidden: Tensor) -> Tensor:
        """[l, B, D] -> [n, B, D] of this rank's n bins, `own_bins` says which. Tokens behind the last whole bin
        are left out."""
        size, tokens = self.bin_size, len(hidden)
        first, own = self.first_token(tokens), self.own_bins(tokens)
        head = min(tokens, -first % size)
        body = (tokens - head) // size
        before, inside, behind = hidden.split([head, body * size, tokens - head - body * size])
        sums = inside if size == 1 else inside.unflatten(0, (body, size)).sum(1)
        crossing = self._crossing(tokens)
        if crossing:
            part = hidden.new_zeros(len(crossing), *hidden.shape[1:])
            for piece, number in ((before, first // size), (behind, (first + head) // size + body)):
                # A rank that has nothing to add still adds an empty sum: every rank takes part in the backward pass.
                known = number in crossing
                place = torch.tensor([crossing.index(number) if known else 0], device=hidden.device)
                part = part.index_add(0, place, (piece if known else piece[:0]).sum(0, keepdim=True))
            complete = self.sum_for_owners(part)
            mine = [place for place, number in enumerate(crossing) if number in own]
            sums = torch.cat([sums, complete[mine]])  # a bin that crosses the border behind this slice is its last one
        return sums / size

    def own_bins(self, tokens: int, *, of_slice: bool = False) -> range:
        """Those that begin among this rank's tokens and are whole, if each rank holds so many tokens.

        Args:
            of_slice: those of the whole context slice, where the tensor ranks each hold a part of it.
        """
        first, count = self.first_token(tokens), self._count(tokens)
        if of_slice:
            tokens *= self.sequence.size
            first = self.context.rank * tokens
        return range(min(-(-first // self.bin_size), count), min(-(-(first + tokens) // self.bin_size), count))

    def bins(self, tokens: int) -> int:
        """Of all ranks, where this context rank's slice has so many tokens."""
        return tokens * self.context.size // self.bin_size

    def _count(self, tokens: int) -> int:
        return tokens * self.context.size * self.sequence.size // self.bin_size

    def _crossing(self, tokens: int) -> list[int]:
        """The whole bins that have tokens on several ranks, in order; the same on every rank."""
        borders = range(tokens, tokens * self.context.size * self.sequence.size, tokens)
        found = {border // self.bin_size for border in borders if border % self.bin_size}
        return sorted(number for number in found if number < self._count(tokens))


class BinnedModel(BinMeans):
    """[B, l] -> [B, n, outputs] of the n bins that are this rank's.

    Of the loss that follows each rank counts that of its bins, and the sum over the tensor ranks' under sequence
    parallelism is each one's.
    """

    def __init__(self, backbone: HyenaModel, *, outputs: int, bin_size: int, seed: int) -> None:
        super().__init__(backbone, nn.Linear(backbone.config.hidden_size, outputs), bin_size=bin_size, seed=seed)

    def forward(self, input_ids: Tensor, _lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """Logits, or numbers, in float32 at least; those of bins behind the end of a sequence mean nothing.

        Args:
            input_ids: int64 [B, l], this context rank's slice.
        """
        means = self.means(self.hidden(input_ids, dropout_key))
        weight, bias = (whole(part, self.sequence) for part in (self.head.weight, self.head.bias))
        return nn.functional.linear(means, weight, bias).transpose(0, 1)
