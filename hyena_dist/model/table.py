"""The placement table of a model: an entry for every weight, by its name.

A parameter without exactly one placement is an error, and so is an entry without a parameter.
"""

import re
from collections.abc import Iterable

from torch import nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.heads import HeadKind, head_of
from hyena_dist.model.kinds import letter_of, mixer_kind
from hyena_dist.model.placement import Placement, Weights, column, norm, row, within


def part_placements(part: nn.Module, name: str, config: HyenaConfig) -> dict[str, Placement]:
    """The Placement of every parameter of a part of a model, by its name in the model.

    Args:
        part: built with or without the rest of the model. Its mixer, if it is one or has one, may be of another kind
            than the configuration has in that layer.
        name: of the part in the model, such as "layers.0.mixer".

    Raises:
        ValueError: a name matches no entry.
    """
    layer = within(r"layers\.\d+\.", _layer(config, letter_of(part)))
    return _match((f"{name}.{own}" for own, _ in part.named_parameters()), _around(head_of(config)) | layer)


def placement_table(names: Iterable[str], config: HyenaConfig, head: HeadKind | None = None) -> dict[str, Placement]:
    """The Placement of every parameter of a model of this configuration and this head, by name; None: the language
    model's.

    Raises:
        ValueError: a name matches no entry, or an entry matches no name.
    """
    kinds = config.layer_kinds
    numbers = {letter: "|".join(str(i) for i, kind in enumerate(kinds) if kind == letter) for letter in set(kinds)}
    entries = _around(head or head_of(config))
    for letter, layers in numbers.items():
        entries |= within(rf"layers\.({layers})\.", _layer(config, letter))
    table = _match(names, entries)
    unused = [pattern for pattern in entries if not any(re.fullmatch(pattern, name) for name in table)]
    if unused:
        raise ValueError(f"entries of the placement table without a parameter: {sorted(unused)}")
    return table


def _around(head: HeadKind) -> Weights:
    """What stands around the layers."""
    return {r"embedding\.word_embeddings\.weight": Placement(tp_dim=0), **norm("final_norm"),
            **within(r"head\.", head.weights)}


def _layer(config: HyenaConfig, letter: str | None) -> Weights:
    """One layer with a mixer of this kind; None: without its mixer."""
    mixer = {} if letter is None else mixer_kind(letter).weights(config)
    return {**norm("input_norm"), **norm("mlp_norm"), **column(r"mlp\.fc1"), **row(r"mlp\.fc2", config.num_layers),
            **within(r"mixer\.", mixer)}


def _match(names: Iterable[str], entries: Weights) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for name in names:
        matches = [pattern for pattern in entries if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            raise ValueError(f"parameter {name} must match one entry of the placement table, matches {matches}")
        found[name] = entries[matches[0]]
    return found
