"""A sweep's file: its keys, read strictly. What they mean together is for `expand` to say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from yaml import YAMLError

from hyena_dist.config.errors import ConfigError, one_line, read_remedy
from hyena_dist.config.plain import open_regular
from hyena_dist.config.schema import Config
from hyena_dist.config.values import parse_yaml
from hyena_dist.tasks.sweep.arithmetic import keys_in

KEYS = {f"{section}.{key}": hint for section, kind in get_type_hints(Config).items()
        for key, hint in get_type_hints(kind).items() if key in {each.name for each in fields(kind)}}
"""Every key of a run's configuration, with its type."""
OWN = {"train.run_dir": "each point has a directory of its own in `runs`", "train.resume": "each point resumes itself"}
"""Keys that a sweep sets itself, and why."""
SEEDS = ("train.seed", "data.seed")
"""What a value of `seeds` sets."""

Choice = dict[str, Any]
"""Keys and values that stand together: one step along an axis."""


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A branch of every point that can have one: from `at`, down in `cooldown` steps."""

    at: int | str
    """A step, or an expression like 0.5 * train.steps."""
    cooldown: int | str
    """Steps, or an expression."""


@dataclass(frozen=True, kw_only=True)
class MetricCommand:
    """A number beside the loss, which a program of the user's finds for a finished run."""

    name: str
    command: tuple[str, ...]
    """The program and its arguments, for no shell; `{run_dir}` in them is the run's directory. The last line of its
    output is a number."""
    timeout: float = 3600.0
    """Seconds that it may take."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep's file. The points are every combination of one choice from each axis."""

    path: Path
    base: str
    """The configuration that all points begin with: a file, or the name of a preset."""
    runs: Path
    """Directory of the sweep: everything that is written is in here."""
    set: Choice = field(default_factory=dict)
    """Keys that replace the base's in every point."""
    axes: tuple[tuple[Choice, ...], ...] = ()
    """Of each axis its choices."""
    budgets: tuple[float, ...] = ()
    """Training FLOPs, for each of which train.steps is solved; empty: train.steps is as it stands."""
    derive: dict[str, str] = field(default_factory=dict)
    """Keys whose values follow from those of others."""
    seeds: tuple[int, ...] = ()
    forks: tuple[Fork, ...] = ()
    metric: MetricCommand | None = None
    launch: tuple[str, ...] = ()
    """What starts the ranks of a point, as [torchrun, --nproc-per-node=2]; `{port}` in it is a free port. Empty: a
    point is one process."""
    ranks: int = 1
    """How many ranks that are."""
    invalid: str = "refuse"
    """What `run` does with points that the configuration's checks refuse: refuse to start, or skip them."""


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        ConfigError: it cannot be read, or a key of it is unknown, of another type, or contradicts another.
    """
    path = Path(path)
    try:
        with open_regular(path) as stream:
            content = parse_yaml(stream.read().decode("utf-8"), Any)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the sweep: {error.strerror or error}: "
                          f"{read_remedy(error, 'give the path of a YAML file')}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a valid YAML file: {one_line(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return _sweep(path, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _sweep(path: Path, content: Any) -> Sweep:
    known = [each.name for each in fields(Sweep) if each.name != "path"]
    content = _mapping("the file", content)
    for key in content:
        if key not in known:
            raise ConfigError(f"{key} is not a key of a sweep: use {', '.join(known)}")
    for key in ("base", "runs"):
        if not isinstance(content.get(key), str) or not content[key].strip() or "\0" in content[key]:
            raise ConfigError(f"{key} must be a path, got {content.get(key)!r}" if key in content else
                              f"{key} is missing: give it, as in {_EXAMPLES[key]}")
    given = {key: value for key, value in content.items() if key not in ("base", "runs")}
    sweep = Sweep(path=path, base=content["base"], runs=Path(content["runs"]).expanduser(),
                  **{key: _READERS[key](key, value) for key, value in given.items()})
    _refuse_twice(sweep)
    return sweep


_EXAMPLES = {"base": "base: quickstart", "runs": "runs: runs/my-sweep"}


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{key} must be keys and values, each key with its value behind a colon, got {value!r:.60}")
    return value


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key} must be a list of at least one value, got {value!r:.60}")
    return value


def _key(where: str, key: str) -> str:
    if key not in KEYS:
        near = [name for name in KEYS if name.split(".")[1] == key.rpartition(".")[2]]
        raise ConfigError(f"{where}: {key} is not a key of a configuration: "
                          + (f"use {near[0]}" if near else "see hyena_dist/config/sections for the keys"))
    if key in OWN:
        raise ConfigError(f"{where}: {key} is not for a sweep to set: {OWN[key]}: leave it out")
    return key


def _choice(where: str, value: Any) -> Choice:
    return {_key(where, key): inner for key, inner in _mapping(where, value).items()}


def _axes(key: str, value: Any) -> tuple[tuple[Choice, ...], ...]:
    found: list[tuple[Choice, ...]] = []
    for name, inner in _mapping(key, value).items():
        where = f"{key}.{name}"
        if name == "zip":
            for index, entry in enumerate(inner if isinstance(inner, list) and inner else [inner]):
                found.append(_zipped(f"{where}[{index}]" if isinstance(inner, list) else where, entry))
        elif name == "points":
            found.append(tuple(_choice(f"{where}[{index}]", entry) for index, entry in enumerate(_list(where, inner))))
        else:
            _key(key, name)
            found.append(tuple({name: each} for each in _list(where, inner)))
    return tuple(found)


def _zipped(where: str, value: Any) -> tuple[Choice, ...]:
    columns = {_key(where, key): _list(f"{where}.{key}", inner) for key, inner in _mapping(where, value).items()}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{where}: its lists must be of one length, got "
                          + ", ".join(f"{length} of {key}" for key, length in lengths.items()))
    return tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _budgets(key: str, value: Any) -> tuple[float, ...]:
    for index, budget in enumerate(_list(key, value)):
        if type(budget) not in (int, float) or not 0 < budget < math.inf:
            raise ConfigError(f"{key}[{index}] must be a number of FLOPs greater than 0, got {budget!r}")
    return tuple(float(budget) for budget in dict.fromkeys(value))


def _derive(key: str, value: Any) -> dict[str, str]:
    found = {}
    for name, text in _mapping(key, value).items():
        where = f"{key}.{_key(key, name)}"
        if not {int, float} & {KEYS[name], *get_args(KEYS[name])}:
            raise ConfigError(f"{where}: only numbers can be derived: set it, or make it an axis")
        if type(text) not in (str, int, float):
            raise ConfigError(f"{where} must be an expression like 0.1 * train.steps, got {text!r:.60}")
        try:
            for read in keys_in(str(text)):
                if read not in KEYS:
                    raise ConfigError(f"{read} is not a key of a configuration")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        found[name] = str(text)
    return found


def _seeds(key: str, value: Any) -> tuple[int, ...]:
    for index, seed in enumerate(_list(key, value)):
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ConfigError(f"{key}[{index}] must be a whole number of 32 bits, got {seed!r}")
    return tuple(dict.fromkeys(value))


def _forks(key: str, value: Any) -> tuple[Fork, ...]:
    found = []
    for index, entry in enumerate(_list(key, value)):
        where = f"{key}[{index}]"
        if not isinstance(entry, dict) or entry.keys() != {"at", "cooldown"}:
            raise ConfigError(f"{where} must be like {{at: 400, cooldown: 100}}, got {entry!r:.60}")
        for name, inner in entry.items():
            if isinstance(inner, str):
                keys_in(inner)
            elif type(inner) is not int or inner < 1:
                raise ConfigError(f"{where}.{name} must be a number of steps greater than 0, or an expression like "
                                  f"0.5 * train.steps, got {inner!r:.60}")
        found.append(Fork(**entry))
    return tuple(found)


def _metric(key: str, value: Any) -> MetricCommand:
    value = _mapping(key, value)
    known = [each.name for each in fields(MetricCommand)]
    if unknown := [name for name in value if name not in known]:
        raise ConfigError(f"{key}.{unknown[0]} is not a key of it: use {', '.join(known)}")
    if not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ConfigError(f"{key}.name must be a word, got {value.get('name')!r:.60}")
    seconds = value.get("timeout", MetricCommand.timeout)
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise ConfigError(f"{key}.timeout must be a number of seconds, got {seconds!r:.60}")
    return MetricCommand(name=value["name"], timeout=float(seconds),
                         command=_words(f"{key}.command", value.get("command")))


def _words(key: str, value: Any) -> tuple[str, ...]:
    for index, word in enumerate(_list(key, value)):
        if not isinstance(word, str) or not word or "\0" in word:
            raise ConfigError(f"{key}[{index}] must be a word: write it in quotes, got {word!r:.60}")
    return tuple(value)


def _ranks(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} must be a whole number greater than 0, got {value!r:.60}")
    return value


def _invalid(key: str, value: Any) -> str:
    if value not in ("refuse", "skip"):
        raise ConfigError(f"{key} must be refuse or skip, got {value!r:.60}")
    return str(value)


_READERS: Mapping[str, Any] = {
    "set": _choice, "axes": _axes, "budgets": _budgets, "derive": _derive, "seeds": _seeds, "forks": _forks,
    "metric": _metric, "launch": _words, "ranks": _ranks, "invalid": _invalid}


def _refuse_twice(sweep: Sweep) -> None:
    """Raises ConfigError: two places of the file set one key."""
    taken = {key: "set" for key in sweep.set}
    places = [("axes", {key for choice in axis for key in choice}) for axis in sweep.axes]
    places += [("derive", set(sweep.derive)), ("seeds", set(SEEDS) if sweep.seeds else set()),
               ("budgets", {"train.steps"} if sweep.budgets else set())]
    for place, keys in places:
        for key in sorted(keys):
            if key in taken:
                raise ConfigError(f"{key} is set twice, by {taken[key]} and by {place}: leave it out of one")
            taken[key] = place
    if sweep.ranks > 1 and not sweep.launch:
        raise ConfigError(f"ranks is {sweep.ranks} and launch does not say what starts them: give it, as in launch: "
                          f"[torchrun, --nproc-per-node={sweep.ranks}]")
