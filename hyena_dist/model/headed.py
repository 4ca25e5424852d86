"""A backbone under a head of another task. What the heads have in common: which tokens a rank holds, and how its part
of a sum becomes the whole.

Every context rank counts its own part of the loss, and gradients are summed over the context ranks. Under sequence
parallelism the tensor ranks hold different tokens too; otherwise they hold the same ones and compute the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyena_dist.model.initial import initialize
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.placement import ZERO, Placement
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.collectives import copy_to, reduce_from
from hyena_dist.parallel.groups import Axis

WEIGHT, BIAS = Placement(), Placement(weight_decay=False, initial=ZERO)
"""Placements of a head's products; every tensor rank holds all of them."""


class HeadedModel(nn.Module):
    """A backbone and a head, whose weights have names that begin with `head.`.

    Args:
        backbone: whose own head is not used; where that has weights of its own they are frozen.
        head: a module on the CPU; it is moved to where the backbone's weights are.
        placements: of the head's weights, by their names in this module.
        seed: of the head's first values.
    """

    def __init__(self, backbone: HyenaModel, head: nn.Module, placements: Mapping[str, Placement], *,
                 seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        weight = next(backbone.parameters())
        self.head: Any = head.to(weight.device, weight.dtype)
        self._placements = dict(placements)
        backbone.head.requires_grad_(False)
        initialize(self.head, self._placements, Axis(), seed, prefix="head.")

    def placement(self) -> dict[str, Placement]:
        """The placement of every parameter."""
        return {**{f"backbone.{name}": entry for name, entry in self.backbone.placement().items()}, **self._placements}

    @property
    def token_multiple(self) -> int:
        """As that of the backbone."""
        return self.backbone.token_multiple

    @property
    def context(self) -> Axis:
        """The ranks over which sequences are cut."""
        return self.backbone.context

    @property
    def sequence(self) -> Axis:
        """The tensor ranks, where each holds tokens of its own; else one rank."""
        return self.backbone.tensor if self.backbone.config.sequence_parallel else Axis()

    def hidden(self, input_ids: Tensor, dropout_key: DropoutKey | None) -> Tensor:
        """[l, B, D], the final norm's output of the tokens that this rank holds, in float32 at least."""
        found = self.backbone.hidden_states(input_ids, dropout_key)
        return found if found.dtype == torch.float64 else found.float()

    def first_token(self, tokens: int) -> int:
        """Where in the whole sequence this rank's tokens begin, if each rank holds so many."""
        return (self.context.rank * self.sequence.size + self.sequence.rank) * tokens

    def sum_for_all(self, part: Tensor) -> Tensor:
        """The sum over all ranks that hold tokens, of which each context rank then counts a part, and each tensor rank
        the same."""
        part = reduce_from(part, self.sequence)
        return copy_to(reduce_from(part, self.context), self.context)

    def sum_for_owners(self, part: Tensor) -> Tensor:
        """The same sum, of which each element is then counted by one of all these ranks alone."""
        for axis in (self.sequence, self.context):
            part = copy_to(reduce_from(part, axis), axis)
        return part
