"""Violated rules become one error, with values that were tried: one that is advised leaves nothing wrong that was not
so before.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config


@dataclass(frozen=True)
class Misfit:
    """A violated rule that another value of one key may satisfy."""

    text: str
    """Which rule; names the keys and their values."""
    key: str
    """Whose value to change: a whole number."""
    step: int = 1
    """What that value has to be a multiple of."""
    near: int | None = None
    """The value near which another one is looked for; None: the key's own."""
    otherwise: str = ""
    """What to do where no other value of the key satisfies all rules, or beside it."""


Problem = str | Misfit
Rules = Callable[[Config, int], list[Problem]]
"""Every violation of a configuration on a number of ranks."""

TRIED = 64
"""Values of a key, in each direction, that are tried for an advice."""


def refuse(rules: Rules, config: Config, world_size: int) -> None:
    """Refuse a configuration that violates rules.

    Raises:
        ConfigError: all violations in one line, each naming key, value and remedy.
    """
    if problems := rules(config, world_size):
        lines = (problem if isinstance(problem, str) else _advised(problem, rules, config, world_size)
                 for problem in problems)
        raise ConfigError("; ".join(lines))


def _advised(misfit: Misfit, rules: Rules, config: Config, world_size: int) -> str:
    """What is wrong, and the nearest values of its key that leave nothing wrong that was not so before."""
    others = [problem for problem in rules(config, world_size) if _key_of(problem) != misfit.key]

    def nearest(values: Iterable[int]) -> list[str]:
        return [str(value) for value in values if _satisfies(rules, _with(config, misfit.key, value), world_size,
                                                             misfit.key, len(others))][:1]

    size = _value_of(config, misfit.key) if misfit.near is None else misfit.near
    step = misfit.step
    below = nearest(range((size - 1) // step * step, max(0, size - (TRIED + 1) * step), -step))
    above = nearest(range((size // step + 1) * step, size + (TRIED + 1) * step, step))
    advice = f"use {' or '.join([*below, *above])}" if below or above else ""
    if advice and not misfit.text.startswith(misfit.key):
        advice = advice.replace("use", f"set {misfit.key} to", 1)
    alternative = misfit.otherwise if not advice or "=" in misfit.otherwise else ""
    return f"{misfit.text}: {', or '.join(filter(None, [advice, alternative]))}"


def _satisfies(rules: Rules, config: Config | None, world_size: int, key: str, others: int) -> bool:
    """Whether no rule finds fault with this key any more, and at most as many as before with others."""
    if config is None:
        return False
    problems = rules(config, world_size)
    return len(problems) <= others and not any(_key_of(problem) == key for problem in problems)


def _key_of(problem: Problem) -> str:
    return "" if isinstance(problem, str) else problem.key


def _value_of(config: Config, key: str) -> int:
    section, name = key.split(".", 1)
    return getattr(getattr(config, section), name)


def _with(config: Config, key: str, value: int) -> Config | None:
    """The configuration with another value of a key; None: the key does not take it."""
    section, name = key.split(".", 1)
    try:
        return replace(config, **{section: replace(getattr(config, section), **{name: value})})
    except ValueError:
        return None
