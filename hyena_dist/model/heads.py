"""What stands on the final norm: heads. All that the rest of the package asks about one is in its entry, a `HeadKind`.

The configuration chooses between the two of a language model, in `HEADS`. A head of another task is an entry of its
own, which whoever builds the model gives to it: `build_model(config, groups, head=...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.placement import Placement, Weights
from hyena_dist.ops.linear import linear
from hyena_dist.ops.norm import NormWeights
from hyena_dist.parallel.groups import tensor_axis


class Head(Protocol):
    """The call of a head."""

    def __call__(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:
        """[l, B, D], what the final norm reads -> the model's output, here [B, l, V / T]; the rows come first.

        Over several tensor ranks the gradients of x and of the norm are summed over them: each rank's output must
        depend on its own share of the weights, or count one T-th.

        Args:
            norm: the final norm, still to be applied (`ops.linear` and `ops.norm` take it).
            embedding: this tensor rank's rows of the embedding's weight, [V / T, D].
        """
        ...


class TiedHead(nn.Module):
    """The published head: its weight is the embedding's, and it has none of its own."""

    def __init__(self, _config: HyenaConfig, _pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()

    def forward(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:
        return linear(x, embedding, norm=norm).transpose(0, 1)


class TokenHead(nn.Module):
    """A language model's head with a weight of its own; its rows are split over the tensor ranks as those of the
    embedding are."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()
        rows = config.padded_vocab_size // tensor_axis(pg_collection).size
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:  # noqa: ARG002 - it needs none
        return linear(x, self.weight, norm=norm).transpose(0, 1)


@dataclass(frozen=True)
class HeadKind:
    """One kind of head."""

    module: Callable[[HyenaConfig, ProcessGroupCollection | None], nn.Module]
    """Builds this rank's share of it, with the call of `Head`; the model around it fills its weights."""
    weights: Weights = field(default_factory=dict)
    """Its own weights, by their names in it: how each is split, decayed, saved and filled."""


HEADS = {
    "tied": HeadKind(TiedHead),
    "untied": HeadKind(TokenHead, {"weight": Placement(tp_dim=0)}),
}
"""The heads of a language model."""


def head_of(config: HyenaConfig) -> HeadKind:
    """The head of a language model of this configuration."""
    return HEADS["tied" if config.tie_embeddings else "untied"]
