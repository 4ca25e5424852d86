"""How one weight is split, decayed, saved and filled: the entry of a placement table.

The table (`model.table`) is the only source of all that: engines, optimizer groups, checkpoints, gradient norms and
initial values read it, and nothing is hung on a Parameter.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STD = 0.02
"""Standard deviation of a product's initial weight, as published."""


class Initial(Protocol):
    """A distribution of initial values."""

    def fill(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the values of a weight of global shape into it, and return it."""
        ...


@dataclass(frozen=True)
class Normal:
    """N(0, std)."""

    std: float = STD

    def fill(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return weight.normal_(0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """U(-1/sqrt(inputs), 1/sqrt(inputs)), torch's default of a linear or a convolution with that many inputs."""

    inputs: int

    def fill(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return weight.uniform_(-1, 1, generator=generator).div_(math.sqrt(self.inputs))


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def fill(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002 - nothing is drawn
        return weight.fill_(self.value)


ZERO, ONE = Constant(0), Constant(1)


@dataclass(frozen=True)
class Placement:
    """How one weight is split, decayed, saved and filled."""

    tp_dim: int | None = None
    """Dimension split over the tensor ranks; None: every tensor rank holds the whole weight."""
    parts: tuple[str, ...] = ()
    """Names of the equal blocks along dimension 0 of a fused weight; each is split over the tensor ranks on its own,
    and is a tensor of its own in checkpoints, so that a file does not depend on the number of ranks."""
    weight_decay: bool = True
    """False for the implicit filter, as published: its optimizer group has no decay."""
    initial: Initial = Normal()
    """Its initial values."""
    lr_scale: float = 1.0
    """What its learning rate is of the run's."""


Weights = dict[str, Placement]
"""Placements by a regular expression of a weight's name within its module."""


def column(name: str, parts: tuple[str, ...] = ()) -> Weights:
    """Of a product whose outputs are split over the tensor ranks (`model.layers.ColumnLinear`)."""
    return {rf"{name}\.weight": Placement(tp_dim=0, parts=parts),
            rf"{name}\.bias": Placement(tp_dim=0, parts=parts, initial=ZERO)}


def row(name: str, num_layers: int) -> Weights:
    """Of a product whose inputs are split over the tensor ranks (`model.layers.RowLinear`) and whose outputs are added
    to the residual stream: it starts the smaller, the more layers add to it."""
    return {rf"{name}\.weight": Placement(tp_dim=1, initial=Normal(STD / math.sqrt(2 * num_layers))),
            rf"{name}\.bias": Placement(initial=ZERO)}


def norm(name: str) -> Weights:
    """Of a LayerNorm (`model.layers.Norm`)."""
    return {rf"{name}\.weight": Placement(initial=ONE), rf"{name}\.bias": Placement(initial=ZERO)}


def within(prefix: str, weights: Weights) -> Weights:
    """The same weights by their names in a module around theirs; `prefix` is a regular expression too."""
    return {prefix + pattern: placement for pattern, placement in weights.items()}


def tensor_share(value: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """A tensor rank's share of a global weight: of each part for itself, one after the other."""
    if placement.tp_dim is None or size == 1:
        return value
    blocks = value.chunk(len(placement.parts), dim=0) if placement.parts else [value]
    return torch.cat([block.chunk(size, dim=placement.tp_dim)[rank] for block in blocks])
