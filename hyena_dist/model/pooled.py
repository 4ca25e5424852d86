"""One answer for a whole sequence: a backbone's hidden states, pooled over the sequence's own tokens, and a linear
head.

Padding stands on the right, where a causal model's other tokens do not see it, and no pooling counts it. Over context
ranks, and over tensor ranks under sequence parallelism, each rank pools the tokens that it holds, and the sums over the
ranks are the whole.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.model.headed import BIAS, WEIGHT, HeadedModel
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey


class PooledModel(HeadedModel):
    """[B, l] -> [B, outputs], the same on every context and tensor rank.

    Of the loss that follows each context rank has to count its share, one P-th: gradients are summed over them.

    Args:
        pooling: mean, last, first, max or sum.
    """

    def __init__(self, backbone: HyenaModel, *, outputs: int, pooling: str, seed: int) -> None:
        super().__init__(backbone, nn.Linear(backbone.config.hidden_size, outputs),
                         {"head.weight": WEIGHT, "head.bias": BIAS}, seed=seed)
        self.pooling = pooling

    def forward(self, input_ids: Tensor, lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """Logits, or numbers, in float32 at least.

        Args:
            input_ids: int64 [B, l], this context rank's slice.
            lengths: int64 [B], tokens of each whole sequence, at least 1.
        """
        return nn.functional.linear(self.pooled(input_ids, lengths, dropout_key), self.head.weight, self.head.bias)

    def pooled(self, input_ids: Tensor, lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """[B, D], what the head reads."""
        hidden = self.hidden(input_ids, dropout_key)
        # [l, 1]: where in the whole sequence each token of this rank stands.
        place = torch.arange(hidden.shape[0], device=hidden.device)[:, None] + self.first_token(hidden.shape[0])
        inside = place < lengths
        if self.pooling == "max":
            return self._largest(hidden, inside)
        if self.pooling == "last":
            inside = place == lengths - 1
        elif self.pooling == "first":
            inside = inside & (place == 0)
        weights = inside.to(hidden.dtype)
        if self.pooling == "mean":
            weights = weights / lengths
        return self.sum_for_all(torch.einsum("lb,lbd->bd", weights, hidden))

    def _largest(self, hidden: Tensor, inside: Tensor) -> Tensor:
        """[l, B, D] -> [B, D], the largest of each channel; equal ones share its gradient, whatever their ranks."""
        inside = inside[..., None]
        with torch.no_grad():
            largest = hidden.masked_fill(~inside, -torch.inf).amax(0)
            axes = [axis for axis in (self.context, self.sequence) if axis.size > 1]
            for axis in axes:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
            here = inside & (hidden == largest)
            count = here.sum(0).to(hidden.dtype)
            for axis in axes:
                dist.all_reduce(count, group=axis.group)
        return self.sum_for_all((hidden * here).sum(0) / count)
