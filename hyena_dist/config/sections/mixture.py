"""The entries of data.mixture and data.mixture_schedule. OmegaConf has no type for a list of them."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hyena_dist.config.sections.ranges import MOST

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
MOST_SOURCES = 1000


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One entry of data.mixture."""

    name: str
    """A word for it in metrics and messages."""
    shards: str | None = None
    """Its shard directory, inside data.shards unless it starts with a slash; null: data.shards itself."""
    regions: str | None = None
    """A BED: only the bases inside its rows are in this source; null: all of the split."""
    weight: float | None = None
    """Its share of the windows, in proportion to the weights of the others; null with data.mixture_temperature."""

    @classmethod
    def read(cls, key: str, entry: Any) -> "MixtureSource":
        """An entry as it stands in the configuration, at `key`.

        Raises:
            ValueError: not a mapping, an unknown or missing key, a value of another type or range.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{key} must be a source like {{name: human, shards: human, weight: 1}}, got {entry!r}")
        _refuse_other_keys(key, entry, cls)
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{key}.name must be a word of at most 64 letters, digits and ._- in plain English "
                             f"letters, got {name!r}" + (": write it in quotes" if type(name) in (int, float) else ""))
        for path in ("shards", "regions"):
            value = entry.get(path)
            if value is not None and not (isinstance(value, str) and value.strip() and "\0" not in value):
                raise ValueError(f"{key}.{path} must be a path, got {value!r}")
        if entry.get("weight") is not None:
            _check_weight(f"{key}.weight", entry["weight"])
        return cls(**entry)


@dataclass(frozen=True, kw_only=True)
class MixtureChange:
    """One entry of data.mixture_schedule."""

    step: int
    """Optimizer steps that are done before the weights hold."""
    weights: dict[str, float]
    """The weight of every source by its name; 0: none of its windows."""

    @classmethod
    def read(cls, key: str, entry: Any, names: Collection[str]) -> "MixtureChange":
        """An entry as it stands in the configuration, at `key`, for sources of these names.

        Raises:
            ValueError: not a mapping, an unknown or missing key or source, a value of another type or range.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{key} must be a change like {{step: 1000, weights: {{human: 1}}}}, got {entry!r}")
        _refuse_other_keys(key, entry, cls)
        step, weights = entry.get("step"), entry.get("weights")
        if type(step) is not int or not 0 < step <= MOST:
            raise ValueError(f"{key}.step must be a whole number greater than 0, at most 2**53, got {step!r}")
        if not isinstance(weights, dict):
            raise ValueError(f"{key}.weights must be a weight for every source, like {{human: 1}}, got {weights!r}")
        for name, weight in weights.items():
            if name not in names:
                raise ValueError(f"{key}.weights.{name}: data.mixture has no such source: use {', '.join(names)}")
            _check_weight(f"{key}.weights.{name}", weight)
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"{key}.weights has no {missing[0]}: give the weight of every source, 0 for none of its "
                             "windows")
        _refuse_all_zero(f"{key}.weights", list(weights.values()))
        return cls(**entry)


def read_mixture(mixture: Any, temperature: float | None) -> list[MixtureSource]:
    """The sources of data.mixture. Raises ValueError: an entry is none, or they do not fit each other."""
    if not isinstance(mixture, list) or not 0 < len(mixture) <= MOST_SOURCES:
        raise ValueError(f"data.mixture must be a list of 1 to {MOST_SOURCES:,} sources like {{name: human, shards: "
                         f"human, weight: 1}}, got {mixture!r:.100}")
    sources = [MixtureSource.read(f"data.mixture[{index}]", entry) for index, entry in enumerate(mixture)]
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        if source.name in names[:index]:
            raise ValueError(f"data.mixture[{index}].name: {source.name} is the name of an earlier source: use another")
        if source.weight is None and temperature is None:
            raise ValueError(f"data.mixture[{index}].weight is missing: give it, or data.mixture_temperature, by which "
                             "weights follow from the sizes")
        if source.weight is not None and temperature is not None:
            raise ValueError(f"data.mixture[{index}].weight and data.mixture_temperature both say what its share is: "
                             "leave one out")
    if temperature is None:
        _refuse_all_zero("the weights of data.mixture", [source.weight or 0.0 for source in sources])
    return sources


def read_schedule(schedule: Any, names: Sequence[str]) -> list[MixtureChange]:
    """The entries of data.mixture_schedule. Raises ValueError: an entry is none, or their steps do not grow."""
    if not isinstance(schedule, list):
        raise ValueError("data.mixture_schedule must be a list of changes like {step: 1000, weights: {human: 1}}, got "
                         f"{schedule!r:.100}")
    changes = [MixtureChange.read(f"data.mixture_schedule[{index}]", entry, names)
               for index, entry in enumerate(schedule)]
    for index in range(1, len(changes)):
        if changes[index].step <= changes[index - 1].step:
            raise ValueError(f"data.mixture_schedule[{index}].step ({changes[index].step}) is not after the "
                             f"{changes[index - 1].step} of the change before: order them by step")
    return changes


def _refuse_other_keys(key: str, entry: dict[Any, Any], kind: type[MixtureSource] | type[MixtureChange]) -> None:
    known = [each.name for each in fields(kind)]
    for name in entry:
        if name not in known:
            raise ValueError(f"{key}.{name} is not a key of it: use {', '.join(known)}")


def _check_weight(key: str, weight: Any) -> None:
    if type(weight) not in (int, float) or not 0 <= weight < math.inf or weight > MOST:
        raise ValueError(f"{key} must be a number from 0 to 2**53, got {weight!r}")


def _refuse_all_zero(what: str, weights: Sequence[float]) -> None:
    if not any(weights):
        raise ValueError(f"{what} are all 0: give at least one source a weight greater than 0")
