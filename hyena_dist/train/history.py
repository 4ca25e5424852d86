"""RUN/history.jsonl: every start of a run, what it went on from, and the keys that were changed on the way.

One object a line. That of a beginning has `"begins": true` and is the first: `"from": null` says that the run began
afresh, else it is a branch of the run of that checkpoint, of which it `"takes"` state or weights. A run of a version
before this file has no such line. A line that cannot be read says nothing, and stays.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyena_dist.checkpoint.directory import Checkpoint
from hyena_dist.runtime.files import write_whole
from hyena_dist.train.row_file import content_of

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Start:
    """What a run begins with, or goes on from."""

    checkpoint: Checkpoint
    takes: str = "state"
    """state: weights, moments, place in the data, loss scale and step; weights: those alone, to start at step 0."""
    own: bool = True
    """Whether it is a checkpoint of the run itself; else the run is a branch that begins here."""
    changed: tuple[tuple[str, Any, Any], ...] = ()
    """Key, old and new value of what the run's configuration has changed since."""

    @property
    def step(self) -> int:
        """The first step is the one after it."""
        return 0 if self.takes == "weights" else int(self.checkpoint.metadata["step"])


def read_beginning(run_dir: Path) -> dict[str, Any] | None:
    """The line of a run's beginning; None: it has none, or none that can be read."""
    try:
        first = json.loads(content_of(run_dir / HISTORY).splitlines()[0])
    except (OSError, ValueError, IndexError, RecursionError):
        return None
    known = isinstance(first, dict) and {"from", "takes", "resume", "step"} <= first.keys()
    return first if known and first.get("begins") is True else None


def note_start(run_dir: Path, start: Start | None, resume: str) -> None:
    """Add a line; that of a beginning replaces all before it.

    Args:
        start: None: afresh.
        resume: train.resume, a path in it without `..` and links: how a branch knows its origin again.

    Raises:
        OSError: it could not be written.
    """
    began = start is None or not start.own
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "begins": began, "step": start.step if start else 0,
            "from": str(start.checkpoint.path.resolve()) if start else None, "takes": start.takes if start else None,
            "resume": resume, "changed": {key: [old, new] for key, old, new in start.changed} if start else {}}
    lines = [*([] if began else content_of(run_dir / HISTORY).splitlines()), json.dumps(line).encode()]
    write_whole(run_dir / HISTORY, lambda path: path.write_bytes(b"\n".join(lines) + b"\n"))
