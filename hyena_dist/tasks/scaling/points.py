"""The runs that a law is fitted to: read from a sweep's directory or a CSV, and left out by written rules only."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError, one_line, read_remedy
from hyena_dist.config.plain import open_regular
from hyena_dist.tasks.sweep.expand import varied
from hyena_dist.tasks.sweep.point import POINTS
from hyena_dist.tasks.sweep.state import LARGEST, STATE, read_states

ANCHORS = Path(__file__).parent / "anchors"
"""Published runs and optima; its README says where they are from."""

COLUMNS = {
    "params": ("params", "N", "parameters", "params_planned", "n_params"),
    "tokens": ("tokens", "D", "tokens_planned", "n_tokens"),
    "loss": ("loss", "L", "val_loss", "final_loss"),
    "flops": ("flops", "C", "achieved_flops", "train_flops"),
    "budget": ("budget",),
    **{name: (name,) for name in ("id", "status", "error", "params_non_embedding", "unique_tokens", "epochs", "seq_len",
                                  "hidden_size", "num_layers", "lr", "steps", "seed", "seconds", "mfu", "metric",
                                  "forked_from")},
}
"""Columns of a CSV: what each is called here, and the names that it is known by, the first that is there."""
NEEDED = ("params", "tokens", "loss")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One finished run."""

    id: str
    params: float
    """N: trained weights."""
    tokens: float
    """D: tokens that it was trained on, repeated ones included."""
    loss: float
    """Final validation loss in nats: a base of this project's runs, a token of others."""
    flops: float | None = None
    """C: exact floating-point operations of the training; None: not known, and never 6 N D for want of them."""
    budget: float | None = None
    """Operations that were planned for it, where it is a point of an isoFLOP sweep."""
    unique_tokens: float | None = None
    epochs: float | None = None
    seq_len: float | None = None
    hidden_size: float | None = None
    num_layers: float | None = None
    lr: float | None = None
    steps: float | None = None
    seed: float | None = None
    seconds: float | None = None
    mfu: float | None = None
    metric: float | None = None
    """A score beside the loss, of the command that the sweep names for one."""
    metric_name: str = ""
    family: str = ""
    """The run that it was forked from in the end, or itself."""
    varied: dict[str, Any] = field(default_factory=dict)
    """The keys that tell the sweep's points apart, with its values of them."""

    @property
    def label(self) -> str:
        """For people: its name, which of a sweep's point is a digest, with what was set for it."""
        settings = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.varied.items())
        return f"{self.id} ({settings})" if settings else self.id


@dataclass(frozen=True)
class Left:
    """A row that is left out, and the rule by which."""

    id: str
    reason: str


POSITIVE = ("flops", "budget", "unique_tokens", "seq_len", "hidden_size", "num_layers", "lr")
"""Numbers that are taken as not known where they are 0 or less; so is every number that is not finite."""
NUMBERS = tuple(item.name for item in fields(Point) if item.name not in ("id", "metric_name", "family", "varied"))


def read_points(path: str | Path, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of a sweep's directory, `points/*/point.json`, or of a CSV.

    Args:
        columns: of a CSV, what a name of `COLUMNS` is called in it.

    Raises:
        ConfigError: there is nothing to read, or it is damaged: `tasks.sweep.state` says what a point may hold.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_csv(path, columns or {})
    if columns:
        raise ConfigError(f"{path} is the directory of a sweep: names of columns are for a CSV: leave them out")
    states = read_states(path)
    if not states:
        raise ConfigError(f"{path} has no {POINTS}/*/{STATE}: give the directory of a sweep that was started, or a CSV")
    return states


def _read_csv(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        with open_regular(path) as stream:
            reader = csv.DictReader(io.StringIO(stream.read().decode("utf-8-sig")), strict=True)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}: "
                          f"{read_remedy(error, 'give a CSV, or the directory of a sweep')}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: is no CSV of UTF-8 ({one_line(error)}): save it as one") from error
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise ConfigError(f"{path}: has the column {twice[0]!r} twice: take one out, or give it another name")
    for name, column in columns.items():
        if name not in COLUMNS:
            raise ConfigError(f"{name}={column}: there is no {name} to read: use one of {', '.join(COLUMNS)}")
        if column not in header:
            raise ConfigError(f"{path}: has no column {column!r}: it has {', '.join(header) or 'none'}")
    called = {name: columns.get(name) or next((known for known in names if known in header), None)
              for name, names in COLUMNS.items()}
    if missing := [name for name in NEEDED if called[name] is None]:
        raise ConfigError(f"{path}: has no column for {', '.join(missing)}: it has {', '.join(header) or 'none'}: say "
                          f"which it is with --column {missing[0]}=NAME")
    found = []
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ConfigError(f"{path}, line {number}: has another number of columns than the first line: mend it")
        read = {name: row[column] for name, column in called.items() if column is not None}
        found.append({"status": "finished", **read, "id": read.get("id") or f"line {number}",
                      **_numbers(read, f"{path}, line {number}")})
    return found


def _numbers(row: Mapping[str, str], where: str) -> dict[str, float | None]:
    """The numbers of a line; an empty cell is none."""
    found: dict[str, float | None] = {}
    for name in NUMBERS:
        text = (row.get(name) or "").strip()
        try:
            found[name] = float(text) if text else None
        except ValueError:
            raise ConfigError(f"{where}: its {name}, {text!r:.40}, is no number: correct it, or leave it empty"
                              ) from None
        size = abs(found[name] or 0.0)
        if LARGEST < size < math.inf or 0 < size < 1 / LARGEST:
            raise ConfigError(f"{where}: its {name}, {text:.40}, is what no run has: correct it, or leave it empty")
    return found


def choose(rows: Iterable[Mapping[str, Any]], *, min_steps: int = 0) -> tuple[list[Point], list[Left]]:
    """The finished runs, and those that are left out by a rule: not finished, no validation loss, no size or no tokens,
    fewer steps than asked for, the same run twice. No row is left out for what its loss is.

    Args:
        rows: as `read_points` has them.
    """
    rows = list(rows)
    ids = {str(row["run_dir"]): str(row.get("id")) for row in rows if row.get("run_dir")}
    parents = {str(row.get("id")): ids.get(str(row["forked_from"]), str(row["forked_from"]))
               for row in rows if row.get("forked_from")}
    parting = varied([row.get("set") or {} for row in rows])
    points: list[Point] = []
    left: list[Left] = []
    seen: dict[Any, str] = {}
    for row in rows:
        name = str(row.get("id"))
        reason = _why_left_out(row, min_steps)
        if reason is None:
            point = _point(row, name, parents, parting)
            key = (point.params, point.tokens, point.flops, point.loss, point.seq_len, point.seed, point.lr)
            if key in seen:
                reason = f"the same run as {seen[key]}: size, tokens, operations, seed and loss are equal"
            else:
                seen[key] = name
                points.append(point)
        if reason is not None:
            left.append(Left(name, reason))
    return points, left


def _why_left_out(row: Mapping[str, Any], min_steps: int) -> str | None:
    status = row.get("status") or "finished"
    if status != "finished":
        error = one_line(row["error"]) if row.get("error") else ""
        return f"{status}: {error}" if error else f"{status}, not finished"
    for key, what in (("loss", "final validation loss"), ("params", "number of weights"),
                      ("tokens", "number of tokens")):
        value = _number(row, key)
        if value is None or not math.isfinite(value) or value <= 0:
            return f"no {what}" if value is None else f"its {what} is {value:g}"
    steps = _number(row, "steps")
    if steps is None or not math.isfinite(steps):
        return "no number of steps, and fewer than --min-steps are left out" if min_steps else None
    return f"{steps:.0f} steps, fewer than {min_steps}" if steps < min_steps else None


def _point(row: Mapping[str, Any], name: str, parents: Mapping[str, str], parting: Sequence[str]) -> Point:
    metric = row.get("metric")
    values = {key: _number(row, key) for key in NUMBERS if key != "metric"}
    if isinstance(metric, Mapping):
        values["metric"], metric_name = _number(metric, "value"), str(metric["name"])
    else:
        values["metric"], metric_name = _number(row, "metric"), "metric"
    given = {key: value for key, value in values.items() if value is not None and math.isfinite(value)
             and (value > 0 or key not in POSITIVE)}
    settings = row.get("set") or {}
    return Point(id=name, metric_name=metric_name, family=_root(name, parents),
                 varied={key: settings[key] for key in parting if key in settings}, **given)


def _root(name: str, parents: Mapping[str, str]) -> str:
    """The first of the runs that a run was forked from; a ring of them, which only a damaged file has, ends."""
    seen = {name}
    while name in parents and parents[name] not in seen:
        name = parents[name]
        seen.add(name)
    return name


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value is None else float(value)


def groups_by_flops(points: Sequence[Point]) -> dict[float, list[Point]]:
    """Points of about the same operations, by their geometric mean: those of one planned budget where there are
    budgets, else those whose operations lie without a gap of more than 15 %."""
    known = sorted((point for point in points if point.budget or point.flops),
                   key=lambda point: point.budget or point.flops or 0.0)
    groups: list[list[Point]] = []
    for point in known:
        cost = point.budget or point.flops or 0.0
        last = groups[-1][-1] if groups else None
        if last is not None and cost <= 1.15 * (last.budget or last.flops or 0.0):
            groups[-1].append(point)
        else:
            groups.append([point])
    return {math.exp(sum(math.log(p.budget or p.flops or 1.0) for p in group) / len(group)): group for group in groups}


def without_seeds(points: Sequence[Point]) -> list[Point]:
    """One point for all that differ in the seed alone, with the mean of their losses: no cell of a table is lower for
    having had more tries."""
    alike: dict[Any, list[Point]] = {}
    for point in points:
        key = (point.params, point.tokens, point.flops, point.seq_len, point.num_layers, point.hidden_size, point.lr,
               {**point.varied, "train.seed": 0, "data.seed": 0})
        alike.setdefault(repr(key), []).append(point)
    return [replace(of_setting[0], loss=sum(point.loss for point in of_setting) / len(of_setting))
            for of_setting in alike.values()]


def lengths_at_fixed_compute(points: Sequence[Point]) -> list[tuple[float, float, dict[int, float]]]:
    """(operations, weights, the lowest loss of each length, means over seeds) of every budget and size that has several
    lengths."""
    points, found = without_seeds(points), []
    for flops, group in groups_by_flops([point for point in points if point.seq_len]).items():
        for size in sorted({point.params for point in group}):
            losses: dict[int, float] = {}
            for point in group:
                if point.params == size:
                    length = int(point.seq_len or 0)
                    losses[length] = min(point.loss, losses.get(length, point.loss))
            if len(losses) > 1:
                found.append((flops, size, losses))
    return found
