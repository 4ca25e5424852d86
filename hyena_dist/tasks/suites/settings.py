"""The configuration of every run of a suite: the protocol's keys, the task's, a point of the grid, and what the command
says otherwise."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.suites.description import Suite, Task
from hyena_dist.tasks.suites.prepare import Prepared


@dataclass(frozen=True)
class Point:
    """One setting of the grid that is tried on a task."""

    name: str
    """Of its directory."""
    keys: Mapping[str, object]


def changes_of(overrides: Sequence[str]) -> dict[str, str]:
    """Values by key of arguments as train.steps=10.

    Raises:
        ConfigError: one is no such argument, or sets what the suite sets for each run.
    """
    found = {}
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"argument {argument!r}: write section.key=value")
        if key in ("finetune.table", "finetune.from", "finetune.test", "finetune.valid", "train.run_dir"):
            raise ConfigError(f"argument {argument!r}: the suite sets {key} for each task: leave it out, and use "
                              "--data, --from and --out")
        found[key] = value
    return found


def points_of(suite: Suite, changes: Mapping[str, str]) -> list[Point]:
    """Every setting of the grid; a key that the command sets is not varied."""
    axes = {key: values for key, values in suite.grid.items() if key not in changes}
    found = []
    for values in itertools.product(*axes.values()):
        keys = dict(zip(axes, values, strict=True))
        words = [f"{key.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else
                 f"{key.rpartition('.')[2]}-{value}" for key, value in keys.items()]
        found.append(Point("_".join(words) or "run", keys))
    return found


def arguments_of(suite: Suite, task: Task, point: Point, changes: Mapping[str, str],
                 prepared: Prepared | None) -> list[str]:
    """The arguments section.key=value of a run. Warm-up and validations follow from the number of sequences: None is
    not known yet."""
    keys: dict[str, object] = {**suite.keys, **task.keys, **point.keys}
    if "train.steps" in changes:
        keys.pop("finetune.epochs", None)
    keys |= changes
    if prepared is not None:
        steps, epochs = _steps(keys, prepared)
        keys = {"optim.warmup_steps": min(max(1, round(suite.warmup * steps)), steps - 1),
                "train.eval_every": max(1, round(steps / max(epochs, 1))), **keys}
    return [f"{key}={_text(value)}" for key, value in keys.items()]


def _steps(keys: Mapping[str, object], prepared: Prepared) -> tuple[int, float]:
    """Optimizer steps of a run, and epochs."""
    try:
        batch = int(str(keys.get("train.global_batch_size", 1)))
        count = prepared.sizes["train"]
        if not prepared.sizes.get("valid"):
            count -= round(float(str(keys.get("finetune.valid_fraction", 0.1))) * count)
        if "train.steps" in keys:
            steps = int(str(keys["train.steps"]))
            return steps, steps * batch / count
        epochs = float(str(keys.get("finetune.epochs", 1)))
    except ValueError:  # a change of the command is no number: the run itself says which
        return 1, 1.0
    return max(1, round(epochs * count / batch)), epochs


def _text(value: object) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(
        value, (bool, type(None))) else str(value)
