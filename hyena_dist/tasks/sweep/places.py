"""A sweep's directory: which process has a point, the states of new points, and the file as it was read."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.files import write_whole
from hyena_dist.runtime.requeue import in_use
from hyena_dist.runtime.run_lock import InUse, RunLock
from hyena_dist.tasks.sweep.file import Sweep
from hyena_dist.tasks.sweep.point import Point, costs
from hyena_dist.tasks.sweep.state import State, new_state, read_state, write_state

RESOLVED = "sweep.yaml"
_TRIES = 5
"""Who looks whether a point is running holds its lock for a moment."""


def _lock(directory: Path) -> RunLock | None:
    """The lock of a directory, which is made; None: somebody else has it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: no such directory can be made ({error.strerror}): choose other `runs` in the "
                          "sweep's file") from error
    for _ in range(_TRIES):
        try:
            return RunLock(directory)
        except InUse:
            time.sleep(0.1)
    return None


@contextmanager
def locked(directory: Path) -> Iterator[RunLock | None]:
    """A context in which a directory is this process's; gives None where it is another's."""
    lock = _lock(directory)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def claim(point: Point) -> RunLock | None:
    """The lock of a point; None: another sweep runs it, or a run of it that has outlived its sweep is still saving."""
    lock = _lock(point.directory)
    if lock is not None and in_use(Path(point.config.train.run_dir)):
        lock.release()
        return None
    return lock


def prepare(points: Sequence[Point], sweep: Sweep) -> dict[str, State]:
    """Read the states of points, and write those of new ones.

    Raises:
        ConfigError: one of them is no state.
        OSError: one could not be written.
    """
    found = {point.id: read_state(point.directory) for point in points}
    states: dict[str, State] = {}
    for point in points:
        state = found[point.id]
        if state is None:
            state = new_state(point, costs(point.config, ranks=sweep.ranks))
            with locked(point.directory) as lock:
                if lock is not None and read_state(point.directory) is None:
                    write_state(point.directory, state)
        states[point.id] = state
    return states


def write_resolved(sweep: Sweep, points: Sequence[Point]) -> None:
    """Leave sweep.yaml in the sweep's directory: the file as it was read, and its points.

    Raises:
        OSError: it could not be written.
    """
    content = {**asdict(sweep), "path": str(sweep.path), "runs": str(sweep.runs),
               "points": {point.id: point.set for point in points}}
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    with locked(sweep.runs) as lock:  # the tasks of an array start together; those that come later have the same text
        if lock is not None:
            write_whole(sweep.runs / RESOLVED, lambda path: path.write_text(text, encoding="utf-8"))
