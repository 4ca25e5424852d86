"""The placement table of a model: an entry for every weight, by its name.

A parameter without exactly one placement is an error, and so is an entry without a parameter.
"""

import re
from collections.abc import Iterable

from hyena_dist.config.mixers import MIXERS
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.heads import head_of
from hyena_dist.model.kinds import mixer_kind
from hyena_dist.model.placement import Placement, Weights, column, norm, row, within


def placements(names: Iterable[str], config: HyenaConfig) -> dict[str, Placement]:
    """The Placement of some parameters of a model of this configuration, by their names there. A mixer that is built
    without a model may be of any kind in any layer.

    Raises:
        ValueError: a name matches no entry, or entries of kinds that do not agree.
    """
    layers = [within(r"layers\.\d+\.", _layer(config, letter)) for letter in MIXERS]
    return _match(names, [_around(config), *layers])


def placement_table(names: Iterable[str], config: HyenaConfig) -> dict[str, Placement]:
    """The Placement of every parameter of a model of this configuration, by name.

    Raises:
        ValueError: a name matches no entry, or an entry matches no name.
    """
    kinds = config.layer_kinds
    numbers = {letter: "|".join(str(i) for i, kind in enumerate(kinds) if kind == letter) for letter in set(kinds)}
    tables = [_around(config), *(within(rf"layers\.({layers})\.", _layer(config, letter))
                                 for letter, layers in numbers.items())]
    table = _match(names, tables)
    unused = [pattern for patterns in tables for pattern in patterns
              if not any(re.fullmatch(pattern, name) for name in table)]
    if unused:
        raise ValueError(f"entries of the placement table without a parameter: {sorted(unused)}")
    return table


def _around(config: HyenaConfig) -> Weights:
    """What stands around the layers."""
    return {r"embedding\.word_embeddings\.weight": Placement(tp_dim=0), **norm("final_norm"),
            **within(r"head\.", head_of(config).weights)}


def _layer(config: HyenaConfig, letter: str) -> Weights:
    """One layer with a mixer of this kind."""
    return {**norm("input_norm"), **norm("mlp_norm"), **column(r"mlp\.fc1"), **row(r"mlp\.fc2", config.num_layers),
            **within(r"mixer\.", mixer_kind(letter).weights(config))}


def _match(names: Iterable[str], tables: list[Weights]) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for name in names:
        matches = [(pattern, placement) for table in tables for pattern, placement in table.items()
                   if re.fullmatch(pattern, name)]
        if len({placement for _, placement in matches}) != 1:
            raise ValueError(f"parameter {name} must match one entry of the placement table, matches "
                             f"{[pattern for pattern, _ in matches]}")
        found[name] = matches[0][1]
    return found
