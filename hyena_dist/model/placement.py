"""Where each weight lives and how it is treated: one table, by name.

The table is the only source of: the tensor-parallel axis of a weight, the parts that a fused weight is made of, its
weight decay, and its initial distribution. Engines, optimizer groups, checkpoints and gradient norms read it; nothing
is hung on a Parameter. A parameter that matches no pattern or two is an error, and so is a pattern without parameter.
"""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """How one weight is split, decayed and saved."""

    tp_dim: int | None = None
    """Dimension split over the tensor ranks; None: every tensor rank holds the whole weight."""
    parts: tuple[str, ...] = ()
    """Names of the equal blocks along dimension 0 of a fused weight; each is split over the tensor ranks on its own,
    and is a tensor of its own in checkpoints, so that a file does not depend on the number of ranks."""
    weight_decay: bool = True
    """False for the implicit filter, as published: its optimizer group has no decay."""


def tensor_share(value: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """A tensor rank's share of a global weight: of each part for itself, one after the other."""
    if placement.tp_dim is None or size == 1:
        return value
    blocks = value.chunk(len(placement.parts), dim=0) if placement.parts else [value]
    return torch.cat([block.chunk(size, dim=placement.tp_dim)[rank] for block in blocks])


def gate_names(order: int) -> tuple[str, ...]:
    """The blocks of a Hyena projection of order N, in the published order: x0 | x1 | ... | v."""
    return (*(f"x{i}" for i in range(order)), "v")


def _mixer_patterns(order: int, kinds: Set[str]) -> dict[str, Placement]:
    """Placements of the weights of mixers of these kinds, by pattern of their name within the mixer."""
    gates = gate_names(order)
    filters = tuple(f"h{i}" for i in range(order - 1))
    hyena = {
        r"in_proj\.(weight|bias)": Placement(tp_dim=0, parts=gates),
        r"short_conv\.(weight|bias)": Placement(tp_dim=0, parts=gates),
        r"conv_bias": Placement(tp_dim=0, parts=filters),
        r"filter\.(freq|trunk_(weight|bias)_\d+)": Placement(weight_decay=False),
        r"filter\.last_weight": Placement(tp_dim=0, parts=filters, weight_decay=False),
    }
    attention = {r"qkv_proj\.(weight|bias)": Placement(tp_dim=0, parts=("q", "k", "v"))}
    both = {r"out_proj\.weight": Placement(tp_dim=1), r"out_proj\.bias": Placement()}
    return both | (hyena if "H" in kinds else {}) | (attention if "A" in kinds else {})


def _patterns(order: int, kinds: Set[str], *, tied: bool) -> dict[str, Placement]:
    layer = r"layers\.\d+\."
    head = {} if tied else {r"head\.weight": Placement(tp_dim=0)}
    return head | {
        r"embedding\.word_embeddings\.weight": Placement(tp_dim=0),
        layer + r"(input_norm|mlp_norm)\.(weight|bias)": Placement(),
        **{layer + r"mixer\." + pattern: placement for pattern, placement in _mixer_patterns(order, kinds).items()},
        layer + r"mlp\.fc1\.(weight|bias)": Placement(tp_dim=0),
        layer + r"mlp\.fc2\.weight": Placement(tp_dim=1),
        layer + r"mlp\.fc2\.bias": Placement(),
        r"final_norm\.(weight|bias)": Placement(),
    }


def placements(names: Iterable[str], order: int) -> dict[str, Placement]:
    """The Placement of some parameters of a HyenaModel of this order, by their names there.

    Raises:
        ValueError: a name matches no pattern or more than one.
    """
    patterns = _patterns(order, {"H", "A"}, tied=False)
    table: dict[str, Placement] = {}
    for name in names:
        matches = [pattern for pattern in patterns if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            raise ValueError(f"parameter {name} must match one pattern of the placement table, matches {matches}")
        table[name] = patterns[matches[0]]
    return table


def placement_table(names: Iterable[str], order: int, kinds: Set[str] = frozenset("H"), *,
                    tied: bool = True) -> dict[str, Placement]:
    """Map every parameter name of a HyenaModel of this order and these kinds of layers to its Placement.

    Args:
        tied: whether the head is the embedding; else it has a weight of its own.

    Raises:
        ValueError: a name matches no pattern or more than one, or a pattern matches no name.
    """
    table = placements(names, order)
    unused = [pattern for pattern in _patterns(order, kinds, tied=tied)
              if not any(re.fullmatch(pattern, name) for name in table)]
    if unused:
        raise ValueError(f"patterns of the placement table without a parameter: {sorted(unused)}")
    return table
