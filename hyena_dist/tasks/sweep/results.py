"""What the run of a point has left in its directory: its results, its last error, how far it is."""

import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hyena_dist.config.plain import read_object
from hyena_dist.train.metrics import Row, read_rows
from hyena_dist.train.row_file import json_object
from hyena_dist.train.run_directory import SUMMARY

METRICS = "metrics.jsonl"
_TAIL = 2**16
"""Bytes at the end of a file in which its last lines are."""
_ERROR = "error: "
_NOT_FINITE = re.compile(r"step \d+: loss \S+, gradient norm ")
"""How a run ends whose loss or gradients are no longer numbers (`train.ledger`)."""


class Progress(NamedTuple):
    """How far a run is."""

    step: int
    loss: float | None
    """Of its last row, in training."""


def has_ended(run_dir: Path, steps: int) -> bool:
    """Whether the run has had its last step, and has said so."""
    try:
        return read_object(run_dir / SUMMARY).get("steps") == steps
    except (OSError, ValueError):
        return False


def results(run_dir: Path, steps: int) -> dict[str, Any]:
    """What a state has of a run that has ended. The loss is null where the last validation was no number.

    Raises:
        OSError, ValueError: its files cannot be read.
    """
    summary, rows = read_object(run_dir / SUMMARY), read_rows(run_dir / METRICS)
    last = next((row for row in reversed(rows) if row.split == "val" and row.step == steps), None)
    loss = None if last is None or not math.isfinite(last.loss) else last.loss
    used = [row.extras["mfu"] for row in rows if row.split == "train" and "mfu" in row.extras]
    return {"seconds": summary.get("seconds"), "mfu": statistics.median(used) if used else None, "loss": loss,
            "perplexity": None if loss is None or loss > 700 else math.exp(loss),
            "val": {} if last is None else _parts(last)}


def _parts(row: Row) -> dict[str, dict[str, float]]:
    """The loss of each source and species, nats per base; nothing where there is only one."""
    found: dict[str, dict[str, float]] = {"source": {}, "species": {}}
    for name, value in row.extras.items():
        kind, _, member = name.partition("_perplexity/")
        if kind in found and member and value > 0:
            found[kind][member] = math.log(value)
    return found


def last_error(log: Path, since: int = 0) -> str | None:
    """The last error that a run has said, without the word; else its last line; None: it has said nothing.

    Args:
        since: bytes of the log that are from before this start.
    """
    lines = list(_last_lines(log, since))
    said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)] or lines
    return said[-1] if said else None


def is_divergence(error: str) -> bool:
    """Whether an error is that of a run whose numbers were no longer finite."""
    return _NOT_FINITE.match(error) is not None


def progress(run_dir: Path) -> Progress | None:
    """How far a run is, by the end of its metrics; None: it has no step yet."""
    for line in reversed(list(_last_lines(run_dir / METRICS))):
        row = json_object(line.encode())
        if row is not None and row.get("split") == "train" and type(row.get("step")) is int:
            loss = row.get("loss")
            return Progress(row["step"], loss if isinstance(loss, float) else None)
    return None


def _last_lines(path: Path, since: int = 0) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return
    yield from (line.strip() for line in text.splitlines() if line.strip())
