"""What stands on the final norm: heads. A head is a module with the call of `Head` and an entry in `HEADS`, which says
of what its weights are made; `head_of` chooses by the configuration.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.placement import Placement, Weights
from hyena_dist.ops.linear import linear
from hyena_dist.ops.norm import NormWeights
from hyena_dist.parallel.groups import Axis


class Head(Protocol):
    """The call of a head."""

    def __call__(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:
        """[l, B, D], what the final norm reads -> the head's output of the normalised x, here [l, B, V / T].

        Args:
            embedding: this tensor rank's rows of the embedding's weight, [V / T, D].
        """
        ...


class TiedHead(nn.Module):
    """The published head: its weight is the embedding's, and it has none of its own."""

    def __init__(self, _config: HyenaConfig, _tensor: Axis) -> None:
        super().__init__()

    def forward(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:
        return linear(x, embedding, norm=norm)


class TokenHead(nn.Module):
    """A head with a weight of its own, [..., D] -> [..., V / T]; its rows are split over the tensor ranks as those of
    the embedding are."""

    def __init__(self, config: HyenaConfig, tensor: Axis) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size // tensor.size, config.hidden_size,
                                               dtype=config.params_dtype))

    def forward(self, x: Tensor, norm: NormWeights, embedding: Tensor) -> Tensor:  # noqa: ARG002 - it needs none
        return linear(x, self.weight, norm=norm)


@dataclass(frozen=True)
class HeadKind:
    """One kind of head."""

    module: Callable[[HyenaConfig, Axis], nn.Module]
    """Builds this tensor rank's share of it; the model around it fills its weights."""
    weights: Weights = field(default_factory=dict)
    """Its own weights, with their initial values, by their names in it."""


HEADS = {
    "tied": HeadKind(TiedHead),
    "untied": HeadKind(TokenHead, {"weight": Placement(tp_dim=0)}),
}


def head_of(config: HyenaConfig) -> HeadKind:
    """The head of a model of this configuration."""
    return HEADS["tied" if config.tie_embeddings else "untied"]
