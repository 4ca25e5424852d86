"""The marker of a run that stopped before its end and can be started again. Nothing here imports torch."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import NoReturn

from hyena_dist.config.errors import TrainingError
from hyena_dist.config.plain import read_object
from hyena_dist.runtime.files import write_whole
from hyena_dist.runtime.launcher import job_id, leave, restarts
from hyena_dist.runtime.signals import EXIT_REQUEUE

MOST_STARTS = 3
"""How often a run is started again without having had a step since; then it gives up."""


def requeue_marker(run_dir: Path) -> Path:
    """The file that is there when the run stopped before its end and can be started again."""
    return run_dir / "requeue.json"


def last_marker(run_dir: Path) -> Path:
    """The marker that the present start has taken."""
    return run_dir / "requeued.json"


def write_requeue(run_dir: Path, reason: str, step: int | None) -> None:
    """Say that the run was saved at `step` and stopped; for the first rank, after the save, before any rank ends.

    Args:
        step: None: where the start before ended, because this one had no step.

    Raises:
        TrainingError: for several starts in a row the run has stopped without a step: it would be started for ever.
        OSError: it could not be written.
    """
    before = max((_read(path) for path in (last_marker(run_dir), requeue_marker(run_dir))), default=(-1, 0))
    step = max(before[0], 0) if step is None else step
    starts = before[1] + 1 if before[0] == step else 0
    if starts >= MOST_STARTS:
        last_marker(run_dir).unlink(missing_ok=True)  # whoever submits it again starts counting again
        requeue_marker(run_dir).unlink(missing_ok=True)
        raise TrainingError(f"step {step}: {reason} stopped {starts} starts in a row before a step: the run is "
                            "not to be requeued; give it more time than its start takes, and submit it again")
    content = {"signal": reason, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": job_id(),
               "starts_without_step": starts}
    write_whole(requeue_marker(run_dir), lambda path: path.write_text(json.dumps(content) + "\n", encoding="utf-8"))


def starts_file(run_dir: Path) -> Path:
    """The file that says which start of the present SLURM job was the last one with a step."""
    return run_dir / "starts.json"


def check_starts(run_dir: Path) -> None:
    """Count the starts of this job; for the first rank, when it has the run directory.

    A start that was killed at once (SIGKILL, a lost node) leaves no marker, and SLURM may requeue it all the same.

    Raises:
        TrainingError: SLURM has started this job again several times in a row, and no start came to its first step.
        OSError: it could not be written down.
    """
    job, start = job_id(), restarts()
    if job is None:
        return
    last = _last_with_step(starts_file(run_dir), job)
    if last is None or last > start:
        note_first_step(run_dir, start - 1)
    elif start - last > MOST_STARTS:
        clear_requeue(run_dir)  # whoever submits it again starts counting again
        raise TrainingError(f"SLURM job {job} was killed {start - last - 1} starts in a row before a step: the run is "
                            "given up; look for what killed it (memory, its time limit, the node) with "
                            f"sacct --duplicates -j {job}, and submit it again")


def note_first_step(run_dir: Path, start: int | None = None) -> None:
    """Remember that this start had a step; for the first rank.

    Args:
        start: the number of the start by SLURM's count; None: this one.

    Raises:
        OSError: it could not be written.
    """
    if job_id() is None:
        return
    content = {"job": job_id(), "last_with_step": restarts() if start is None else start}
    write_whole(starts_file(run_dir), lambda path: path.write_text(json.dumps(content) + "\n", encoding="utf-8"))


def end_alone(run_dir: Path, first: bool, reason: str) -> NoReturn:
    """End a process whose run had no step yet, with the marker: a rank that cannot agree with the others in time."""
    status, what = EXIT_REQUEUE, f"{reason} before the first step: ended, to be started again"
    try:
        if first and not in_use(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            write_requeue(run_dir, reason, None)
    except (OSError, TrainingError) as error:
        status, what = 1, f"error: {error}"
    os.write(2, f"{what}\n".encode())
    leave(status)


def in_use(run_dir: Path) -> bool:
    """Whether another process has the run directory; drops this process's own lock, so for its end only."""
    try:
        with (run_dir / "lock").open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return False


def take_requeue(run_dir: Path) -> None:
    """Put the marker aside; for the first rank of a run that starts."""
    if requeue_marker(run_dir).exists():
        requeue_marker(run_dir).replace(last_marker(run_dir))


def clear_requeue(run_dir: Path) -> None:
    """Remove what is left of markers; for the first rank of a run that has reached its end."""
    for path in (requeue_marker(run_dir), last_marker(run_dir), starts_file(run_dir)):
        path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[int, int]:
    """Step and starts without a step of a marker; of none or one that is none: (-1, 0)."""
    try:
        content = read_object(path)
        step, starts = content["step"], content.get("starts_without_step", 0)
        sound = all(type(number) is int and number >= 0 for number in (step, starts))
        return (step, starts) if sound else (-1, 0)
    except (OSError, ValueError, KeyError):
        return -1, 0


def _last_with_step(path: Path, job: str) -> int | None:
    """What the file says of this job; None: nothing."""
    try:
        content = read_object(path)
        last = content["last_with_step"]
        return last if content["job"] == job and type(last) is int else None
    except (OSError, ValueError, KeyError):
        return None
