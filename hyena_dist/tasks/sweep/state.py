"""RUNS/points/ID/point.json: what is known of a point, written as a whole or not at all. All points together are the
one table of a sweep."""

import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError, one_line, read_remedy
from hyena_dist.config.plain import read_object
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.sweep.point import POINTS, Costs, Point

STATE = "point.json"
STATUSES = ("planned", "running", "finished", "failed", "diverged")
"""planned also of one that was stopped before its end, and goes on from its checkpoint."""
UNKNOWN = dict.fromkeys(("error", "seconds", "mfu", "loss", "perplexity", "val", "metric", "started", "ended", "host"))
"""What only the run tells."""
LARGEST = 1e60
"""No number of a run is larger, nor the reciprocal of one: it would overflow where a law is fitted."""
State = dict[str, Any]


def _is_word(value: Any) -> bool:
    return type(value) is str


def _is_mapping(value: Any) -> bool:
    return type(value) is dict


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and (value == 0 or 1 / LARGEST <= abs(value) <= LARGEST)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_metric(value: Any) -> bool:
    return _is_mapping(value) and _is_word(value.get("name")) and _is_number(value.get("value"))


REQUIRED: dict[str, Callable[[Any], bool]] = {
    "id": _is_word, "status": STATUSES.__contains__, "set": _is_mapping, "run_dir": _is_word, "params": _is_count,
    "params_non_embedding": _is_whole, "flops": _is_positive, "tokens": _is_count, "steps": _is_count,
    "seq_len": _is_count, "hidden_size": _is_count, "num_layers": _is_count, "lr": _is_positive}
"""What every state has, and what it may be."""
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "error": _is_word, "seconds": _is_amount, "mfu": _is_amount, "loss": _is_number, "perplexity": _is_number,
    "val": _is_mapping, "metric": _is_metric, "started": _is_word, "ended": _is_word, "host": _is_word,
    "seed": _is_whole, "budget": _is_positive, "unique_tokens": _is_amount, "epochs": _is_amount,
    "forked_from": _is_word, "fork_at": _is_count}
"""What may be null or missing."""


def new_state(point: Point, costs: Costs) -> State:
    """The state of a point that has not run."""
    config = point.config
    return {"id": point.id, "status": "planned", **UNKNOWN, "seed": config.train.seed, "set": point.set,
            "run_dir": config.train.run_dir, **asdict(costs), "steps": config.train.steps,
            "seq_len": config.data.seq_len, "hidden_size": config.model.hidden_size,
            "num_layers": config.model.num_layers, "lr": config.optim.lr, "budget": point.budget,
            "forked_from": point.forked_from, "fork_at": point.fork_at}


def read_state(directory: Path) -> State | None:
    """The state of a point; None: it has none yet.

    Raises:
        ConfigError: the file is none of a point's, or of another point; names it and the remedy.
    """
    path = directory / STATE
    try:
        state = read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): {read_remedy(error, _REMEDY)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is no state of a point ({one_line(error)}): {_REMEDY}") from error
    for key, is_right in (REQUIRED | OPTIONAL).items():
        value = state.get(key)
        if not is_right(value) and (key in REQUIRED or value is not None):
            raise ConfigError(f"{path}: is no state of a point (its {key} is {value!r:.40}): {_REMEDY}")
    if directory.parent.name == POINTS and state["id"] != directory.name:
        raise ConfigError(f"{path}: is the state of another point ({state['id']:.40}): {_REMEDY}")
    if state["status"] == "finished" and state.get("loss") is None:
        raise ConfigError(f"{path}: is finished without a loss: {_REMEDY}")
    return {key: None for key in OPTIONAL} | state


_REMEDY = "delete it, and the point goes on from the checkpoints of its run"


def write_state(directory: Path, state: State) -> None:
    """Write a point's state.

    Raises:
        OSError: it could not be written; the one before is still there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(state, indent=1, allow_nan=False) + "\n"
    write_whole(directory / STATE, lambda path: path.write_text(text, encoding="utf-8"))


def read_states(runs: Path) -> list[State]:
    """The states of all points in a sweep's directory, those that its file no longer has too.

    Raises:
        ConfigError: one of them is no state.
    """
    found: Iterable[Path] = sorted((runs / POINTS).glob(f"*/{STATE}"))
    return [state for path in found if (state := read_state(path.parent)) is not None]


def started(state: State) -> State:
    """The state of a point whose run begins or goes on now."""
    return {**state, "status": "running", "error": None, "started": state["started"] or now(), "ended": None,
            "host": socket.gethostname()}


def ended(state: State, status: str, error: str | None, **found: Any) -> State:
    """The state of a point whose run has ended so."""
    return {**state, **found, "status": status, "error": error, "ended": None if status == "planned" else now()}


def now() -> str:
    """The time as states have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
