"""The points of a sweep's file: every combination of its axes, budgets and seeds, and the branches of each."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.config.checks import cooldown_steps
from hyena_dist.config.digests import json_sha256
from hyena_dist.config.errors import ConfigError, UserError, one_line
from hyena_dist.config.load import load_config, read_config
from hyena_dist.config.presets import find
from hyena_dist.config.schema import Config
from hyena_dist.model.kinds import check
from hyena_dist.tasks.sweep.arithmetic import evaluate, keys_in
from hyena_dist.tasks.sweep.file import KEYS, SEEDS, Fork, Sweep
from hyena_dist.tasks.sweep.point import LETTERS, Point, located, point_id, steps_for

MOST_POINTS = 2_000
STEPS = "train.steps"
_ELSEWHERE = ("train.run_dir=unused", "data.shards=unused")
"""Keys that a base may leave out."""


def expand(sweep: Sweep) -> list[Point]:
    """The points in the order of the file, each once, however often the axes name it. A point that cannot run has its
    problem; forks stand after all others.

    Raises:
        ConfigError: the base cannot be read, the sweep has too many points, or values depend on each other in a circle.
    """
    combinations = [*sweep.axes, tuple({seed_key: seed for seed_key in SEEDS} for seed in sweep.seeds) or ({},)]
    budgets: tuple[float | None, ...] = sweep.budgets or (None,)
    count = len(budgets)
    for axis in combinations:
        count *= len(axis)
    if count > MOST_POINTS:
        raise ConfigError(f"{sweep.path}: its axes make {count:,} points, and at most {MOST_POINTS:,} can be: leave "
                          "values out")
    order = _order(sweep)
    base = _base(sweep)
    found: dict[str, Point] = {}
    for choices in product(*combinations):
        for budget in budgets:
            values = dict(sweep.set)
            for choice in choices:
                values |= choice
            point = _point(sweep, base, values, budget, order)
            found.setdefault(point.id, point)
    for point in list(found.values()):
        forks = list(_forks(sweep, point))
        found[point.id] = _keeping(point, [fork.fork_at for fork in forks if fork.fork_at is not None])
        for fork in forks:
            found.setdefault(fork.id, fork)
    return list(found.values())


def _keeping(point: Point, steps: list[int]) -> Point:
    """The point, keeping its checkpoints of these steps for good."""
    train = point.config.train
    if all(train.keep_every and step % train.keep_every == 0 for step in steps):
        return point
    every = gcd(*steps)
    return replace(point, config=replace(point.config, train=replace(train, save_every=every, keep_every=every)))


class _Base(NamedTuple):
    """What all points begin with."""

    path: Path
    alone: Config
    """The configuration in it."""


def _base(sweep: Sweep) -> _Base:
    """The base of a sweep.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        path = find(sweep.base)
        return _Base(path, read_config(path, _ELSEWHERE))
    except ConfigError as error:
        raise ConfigError(f"{sweep.path}: base: {str(error).removeprefix('--config ')}") from error


def _point(sweep: Sweep, base: _Base, values: dict[str, Any], budget: float | None, order: list[str]) -> Point:
    """The point of these values; with a problem where they cannot run."""
    try:
        config = _resolved(sweep, base, values, budget, order)
    except UserError as error:
        name = point_id_of_values(values, budget)
        return located(Point(id=name, config=base.alone, set=values, budget=budget, problem=one_line(error)),
                       sweep.runs)
    return finished_point(sweep, Point(id=point_id(config), config=config, set=values, budget=budget))


def finished_point(sweep: Sweep, point: Point) -> Point:
    """The point at its place, with the problem that the configuration's checks find."""
    try:
        check(point.config, world_size=sweep.ranks)
    except UserError as error:
        point = replace(point, problem=one_line(error))
    return located(point, sweep.runs)


def point_id_of_values(values: Mapping[str, Any], budget: float | None) -> str:
    """A name for a point that has no configuration."""
    return json_sha256([dict(values), budget])[:LETTERS]


def _resolved(sweep: Sweep, base: _Base, values: dict[str, Any], budget: float | None, order: list[str]) -> Config:
    """The configuration of values, to which those are added that follow from them.

    Raises:
        UserError: there is none.
    """
    lookup = partial(_number, values, base.alone)
    late = [key for key in order if key != STEPS and budget is not None and _reads_steps(sweep, key)]
    for key in order:
        if key not in late:
            values[key] = _derived(sweep, key, lookup)
    if budget is not None:
        config = _load(base, values)
        values[STEPS] = steps_for(config, budget, ranks=sweep.ranks)
        if not values[STEPS]:
            raise ConfigError(f"budget {budget:.4g} is less than half a step: use more, or shorten "
                              "train.seq_len_warmup")
        for key in late:
            values[key] = _derived(sweep, key, lookup)
        config = _with(config, {key: values[key] for key in (STEPS, *late)})
    else:
        config = _load(base, values)
    if budget is not None and steps_for(config, budget, ranks=sweep.ranks) != config.train.steps:
        raise ConfigError(f"derive: {', '.join(late)} follow from train.steps and change the FLOPs of a step, from "
                          "which train.steps follows: give their values")
    return config


def _load(base: _Base, values: Mapping[str, Any]) -> Config:
    overrides = ["train.run_dir=unused", *(f"{key}={json.dumps(value, ensure_ascii=False)}"
                                           for key, value in values.items())]
    return load_config(base.path, overrides)


def _with(config: Config, values: Mapping[str, int | float]) -> Config:
    """The configuration with these numbers.

    Raises:
        ConfigError: a section refuses its own.
    """
    sections: dict[str, dict[str, int | float]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        return replace(config, **{section: replace(getattr(config, section), **changed)
                                  for section, changed in sections.items()})
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _derived(sweep: Sweep, key: str, lookup: Any) -> int | float:
    try:
        value = evaluate(sweep.derive[key], lookup)
    except ConfigError as error:
        raise ConfigError(f"derive.{key}: {error}") from error
    return round(value) if KEYS[key] in (int, int | None) else float(value)


def _number(values: Mapping[str, Any], base: Config, key: str) -> int | float:
    """The value of a key of a point.

    Raises:
        ConfigError: it is no number.
    """
    section, name = key.split(".")
    value = values[key] if key in values else getattr(getattr(base, section), name)
    if type(value) not in (int, float):
        raise ConfigError(f"{key} is {value!r:.60}, which is no number")
    return value


def _order(sweep: Sweep) -> list[str]:
    """The keys of `derive`, each after those that it reads.

    Raises:
        ConfigError: they go in a circle.
    """
    found: list[str] = []
    waiting = list(sweep.derive)
    while waiting:
        ready = [key for key in waiting if not set(keys_in(sweep.derive[key])) & set(waiting)]
        if not ready:
            raise ConfigError(f"{sweep.path}: derive: {', '.join(waiting)} follow from each other in a circle: give "
                              "the value of one")
        found += ready
        waiting = [key for key in waiting if key not in ready]
    return found


def _reads_steps(sweep: Sweep, key: str) -> bool:
    """Whether a derived value follows from train.steps, maybe by way of others."""
    reads = keys_in(sweep.derive[key])
    return STEPS in reads or any(_reads_steps(sweep, other) for other in reads if other in sweep.derive)


def _forks(sweep: Sweep, parent: Point) -> Iterator[Point]:
    """The branches of a point."""
    for index, fork in enumerate(sweep.forks):
        if parent.problem is None:
            point = _fork(sweep, parent, fork, index)
            if point.id != parent.id:  # the run itself is a run that cools down from there
                yield point


def _fork(sweep: Sweep, parent: Point, fork: Fork, index: int) -> Point:
    try:
        at, cooldown = (round(evaluate(str(text), partial(_number, {}, parent.config)))
                        for text in (fork.at, fork.cooldown))
        return located(forked(parent, at=at, cooldown=cooldown, ranks=sweep.ranks), sweep.runs)
    except ConfigError as error:
        name = point_id_of_values({**parent.set, "fork": asdict(fork)}, parent.budget)
        return located(replace(parent, id=name, forked_from=parent.id, problem=f"forks[{index}]: {error}"), sweep.runs)


def forked(parent: Point, *, at: int, cooldown: int, ranks: int) -> Point:
    """A branch of a run, which cools down from a step on.

    Raises:
        ConfigError: the run has no such step, or is no longer at its full learning rate there.
    """
    config = parent.config
    steps, stable = config.train.steps, config.train.steps
    if config.optim.schedule == "wsd":
        stable = steps - cooldown_steps(config.optim, steps)
    elif config.optim.schedule != "constant":
        raise ConfigError(f"optim.schedule={config.optim.schedule} decays from its warm-up on: only runs of wsd and "
                          "constant can be branched into cool-downs")
    if not config.optim.warmup_steps <= at <= stable:
        raise ConfigError(f"step {at} is not between the end of the warm-up ({config.optim.warmup_steps}) and the last "
                          f"step at the full learning rate ({stable})")
    if cooldown < 1:
        raise ConfigError(f"a cool-down takes at least 1 step, got {cooldown}")
    changed = {"train.steps": at + cooldown, "optim.schedule": "wsd", "optim.cooldown": cooldown}
    resume = str(step_directory(Path(config.train.run_dir) / "checkpoints", at))
    config = replace(config, train=replace(config.train, steps=at + cooldown, resume=resume),
                     optim=replace(config.optim, schedule="wsd", cooldown=float(cooldown)))
    check(config, world_size=ranks)
    return replace(parent, id=point_id(config), config=config, set={**parent.set, **changed}, forked_from=parent.id,
                   fork_at=at, budget=None)


def varied(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that tell settings apart, in their order: each of them parts some that those before it leave together,
    so what follows from others is not among them."""
    settings, found = list(settings), list[str]()
    apart = 1
    for key in dict.fromkeys(key for values in settings for key in values):
        classes = {json.dumps([values.get(each) for each in [*found, key]], sort_keys=True) for values in settings}
        if len(classes) > apart:
            found.append(key)
            apart = len(classes)
    return found

