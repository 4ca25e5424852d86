"""Answers as tokens of the vocabulary: a class is the token that the language model says next. There is no new head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.model.headed import HeadedModel
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.collectives import reduce_from


class LabelTokenModel(HeadedModel):
    """[B, l] -> [B, classes]: logits of some tokens behind the last one of each sequence, the same on every context and
    tensor rank.

    Args:
        tokens: ids of the classes.
    """

    def __init__(self, backbone: HyenaModel, tokens: Sequence[int]) -> None:
        trained = [weight.requires_grad for weight in backbone.head.parameters()]
        super().__init__(backbone, nn.Identity(), {}, seed=0)
        for weight, asked in zip(backbone.head.parameters(), trained, strict=True):
            weight.requires_grad_(asked)  # the language model's head is what answers
        self.tokens = list(tokens)

    def forward(self, input_ids: Tensor, lengths: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """As `PooledModel.forward`."""
        hidden = self.hidden(input_ids, dropout_key)
        place = torch.arange(hidden.shape[0], device=hidden.device)[:, None] + self.first_token(hidden.shape[0])
        last = self.sum_for_all(torch.einsum("lb,lbd->bd", (place == lengths - 1).to(hidden.dtype), hidden))
        return F.linear(last, self._rows().to(last.dtype))

    def _rows(self) -> Tensor:
        """[classes, D], of the weight by which the language model gives its logits. Its rows are split over the tensor
        ranks."""
        backbone = self.backbone
        weight = getattr(backbone.head, "weight", None)
        if weight is None:  # it is the embedding's
            weight = backbone.embedding.word_embeddings.weight
        local = torch.tensor(self.tokens, device=weight.device) - backbone.tensor.rank * len(weight)
        elsewhere = (local < 0) | (local >= len(weight))
        rows = weight[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere[:, None], 0)
        return reduce_from(rows, backbone.tensor)
