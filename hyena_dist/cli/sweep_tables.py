"""The points of a sweep as tables for people, on a terminal also while they run."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from hyena_dist.cli.print_table import print_table
from hyena_dist.runtime.requeue import in_use
from hyena_dist.tasks.sweep.expand import varied
from hyena_dist.tasks.sweep.point import Costs, Point
from hyena_dist.tasks.sweep.results import progress
from hyena_dist.tasks.sweep.state import State, read_state, read_states
from hyena_dist.train.wording import MANY_EPOCHS, amount, duration


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right", no_wrap=True) for name in names]


def _axes(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Column]]:
    """The keys that tell points apart, and a column for each; not train.steps, which has a column anyway."""
    keys = [key for key in varied(settings) if key != "train.steps"]
    short = [key.rpartition(".")[2] for key in keys]
    return keys, [Column(name if short.count(name) == 1 else key, justify="right", overflow="fold")
                  for key, name in zip(keys, short, strict=True)]


def _values(of: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """A point's values of the keys, as a file of YAML has them; a key that it leaves to the base is a dash."""
    return [_value(of[key]) if key in of else "-" for key in keys]


def _value(value: Any) -> str:
    """Escaped, since a list looks like markup to the table."""
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "-" if value is None else form.format(value)


def print_plan(points: Sequence[Point], costs: Mapping[str, Costs], states: Sequence[State]) -> None:
    """A row for each point with what it takes, and the total; in points that cannot run, why."""
    keys, columns = _axes([point.set for point in points])
    forks = [Column("fork of", no_wrap=True)] if any(point.forked_from for point in points) else []
    table = Table(*_right("#"), Column("point", no_wrap=True), *forks, *columns,
                  *_right("weights", "steps", "FLOPs", "tokens", "unique", "epochs", "time"), box=SIMPLE_HEAD)
    known = {state["id"]: state for state in states}
    seconds, flops, unknown = 0.0, 0.0, False
    roots = 0
    for point in points:
        is_root = point.forked_from is None and point.problem is None
        number, roots = str(roots) if is_root else "", roots + is_root  # what run --index means
        who = [number, point.id, *([point.forked_from or ""] if forks else []), *_values(point.set, keys)]
        if point.id not in costs:
            table.add_row(*who, "[red]cannot run[/red]")
            continue
        cost = costs[point.id]
        own = known.get(point.id)
        estimate = own["seconds"] if own and own["seconds"] else _estimate(point, cost, states)
        seconds, unknown, flops = seconds + (estimate or 0.0), unknown or estimate is None, flops + cost.flops
        table.add_row(*who, f"{cost.params:,}", f"{point.config.train.steps:,}",
                      f"{cost.flops:.4g}", amount(cost.tokens), _number(cost.unique_tokens, "{:,.0f}"),
                      _number(cost.epochs, "{:.2f}"), "-" if estimate is None else duration(estimate))
    print_table(table)
    time_needed = ("of a time that is known once a point has run" if unknown else
                   f"about {duration(seconds)} one after the other")
    print(f"{len(points)} points, {flops:.4g} FLOPs, {time_needed}")
    for point in points:
        epochs = costs[point.id].epochs if point.id in costs else None
        if epochs is not None and epochs > MANY_EPOCHS:
            print(f"warning: point {point.id} sees its bases {epochs:.1f} times: past about {MANY_EPOCHS} times the "
                  "same bases teach little more", file=sys.stderr)


def _estimate(point: Point, cost: Costs, states: Sequence[State]) -> float | None:
    """Seconds by the rate of the finished point whose steps are the most alike; None: there is none."""
    of_step = cost.flops / point.config.train.steps
    measured = [state for state in states if state["status"] == "finished" and state["seconds"]]
    if not measured:
        return None
    ratios = {state["id"]: state["flops"] / state["steps"] / of_step for state in measured}
    nearest = min(measured, key=lambda state: max(ratios[state["id"]], 1 / ratios[state["id"]]))
    return float(nearest["seconds"] * cost.flops / nearest["flops"])


def print_states(states: Sequence[State]) -> None:
    """A row for each point, as it is now."""
    print_table(_table(states, {}))
    for state in states:
        if state["error"] and state["status"] != "running":
            print(f"{state['id']}: {state['status']}: {state['error']}")


def _looks_running(state: State) -> bool:
    """Whether some process has the point. Not for a process that has one itself, whose own lock this would drop."""
    return in_use(Path(state["run_dir"]).parent)


def _table(states: Sequence[State], since: dict[str, tuple[int, float]],
           is_running: Callable[[State], bool] = _looks_running) -> Table:
    """Args:
        since: the step at which each point was first seen running, and when; is added to.
    """
    keys, columns = _axes([state["set"] for state in states])
    table = Table(Column("point", no_wrap=True), *columns, "status", *_right("step", "loss", "left"), box=SIMPLE_HEAD)
    for state in states:
        seen = progress(Path(state["run_dir"])) if state["status"] not in ("finished",) else None
        step, loss, left = 0 if seen is None else seen.step, None if seen is None else seen.loss, ""
        status = state["status"]
        if status == "finished":
            step, loss = state["steps"], state["loss"]
        elif status == "running":
            if not is_running(state):
                status = "interrupted"
            elif seen is not None:
                first, began = since.setdefault(state["id"], (step, time.monotonic()))
                if step > first:
                    left = duration((time.monotonic() - began) / (step - first) * (state["steps"] - step))
        table.add_row(state["id"], *_values(state["set"], keys), status, f"{step:,}/{state['steps']:,}",
                      _number(loss, "{:.4f}"), left)
    return table


class Board:
    """The table of points while they run, on a terminal; without one nothing is shown.

    Args:
        points: those that this process runs; None: all of `runs`, which others do.
    """

    def __init__(self, points: Sequence[Point] | None = None, *, runs: Path | None = None) -> None:
        self._points, self._runs = points, runs
        self._since: dict[str, tuple[int, float]] = {}
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> "Board":
        if sys.stderr.isatty():
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self) -> None:
        """Read the files and draw the table, at most once a second."""
        if not self._live.is_started or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        if self._points is None:
            assert self._runs is not None
            table = _table(read_states(self._runs), self._since)
        else:
            states = [state for point in self._points if (state := read_state(point.directory)) is not None]
            table = _table(states, self._since, lambda _: True)
        self._live.update(table, refresh=True)
