"""One answer for a whole sequence: a backbone's hidden states, pooled over the sequence's own tokens, and a linear
head.

Padding stands on the right, where a causal model's other tokens do not see it, and no pooling counts it. Over context
ranks, and over tensor ranks under sequence parallelism, each rank pools the tokens that it holds, and the sums over the
ranks are the whole.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.model.initial import initialize
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.placement import ZERO, Placement
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.collectives import copy_to, reduce_from
from hyena_dist.parallel.groups import Axis

HEAD = {"head.weight": Placement(), "head.bias": Placement(weight_decay=False, initial=ZERO)}
"""Placements of the head's weights; every tensor rank holds all of them."""


class PooledModel(nn.Module):
    """[B, l] -> [B, outputs], the same on every context and tensor rank.

    Of the loss that follows each context rank has to count its share, one P-th: gradients are summed over them.

    Args:
        backbone: whose own head is not used; where that has weights of its own they are frozen.
        pooling: mean, last, first, max or sum.
        seed: of the head's first values.
    """

    def __init__(self, backbone: HyenaModel, *, outputs: int, pooling: str, seed: int) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        weight = next(backbone.parameters())
        self.head = nn.Linear(backbone.config.hidden_size, outputs, device=weight.device, dtype=weight.dtype)
        backbone.head.requires_grad_(False)
        initialize(self.head, HEAD, Axis(), seed, prefix="head.")

    def forward(self, input_ids: Tensor, lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """Logits, or numbers, in float32 at least.

        Args:
            input_ids: int64 [B, l], this context rank's slice.
            lengths: int64 [B], tokens of each whole sequence, at least 1.
        """
        return nn.functional.linear(self.pooled(input_ids, lengths, dropout_key), self.head.weight, self.head.bias)

    def pooled(self, input_ids: Tensor, lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """[B, D], what the head reads."""
        hidden = self.backbone.hidden_states(input_ids, dropout_key)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        # [l, 1]: where in the whole sequence each token of this rank stands.
        place = torch.arange(hidden.shape[0], device=hidden.device)[:, None] + self._first_token(hidden.shape[0])
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
        return self._over_ranks(torch.einsum("lb,lbd->bd", weights, hidden))

    def _first_token(self, tokens: int) -> int:
        context, tensor = self.backbone.context, self.backbone.tensor
        if self.backbone.config.sequence_parallel:
            return (context.rank * tensor.size + tensor.rank) * tokens
        return context.rank * tokens

    def _over_ranks(self, part: Tensor) -> Tensor:
        """The sum over all ranks that hold tokens. Every context rank counts one P-th of the loss, so that its gradient
        is summed over them; every tensor rank counts the whole loss."""
        if self.backbone.config.sequence_parallel:
            part = reduce_from(part, self.backbone.tensor)
        return copy_to(reduce_from(part, self.backbone.context), self.backbone.context)

    def _largest(self, hidden: Tensor, inside: Tensor) -> Tensor:
        """[l, B, D] -> [B, D], the largest of each channel; equal ones share its gradient, whatever their ranks."""
        inside = inside[..., None]
        with torch.no_grad():
            largest = hidden.masked_fill(~inside, -torch.inf).amax(0)
            axes = [self.backbone.context, *([self.backbone.tensor] * self.backbone.config.sequence_parallel)]
            for axis in axes:
                if axis.size > 1:
                    dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
            here = inside & (hidden == largest)
            count = here.sum(0).to(hidden.dtype)
            for axis in axes:
                if axis.size > 1:
                    dist.all_reduce(count, group=axis.group)
        return self._over_ranks((hidden * here).sum(0) / count)

    @property
    def token_multiple(self) -> int:
        """As that of the backbone."""
        return self.backbone.token_multiple

    def placement(self) -> dict[str, Placement]:
        """The placement of every parameter."""
        return {**{f"backbone.{name}": entry for name, entry in self.backbone.placement().items()}, **HEAD}
