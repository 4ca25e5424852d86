"""Runs the points of a sweep, some at a time, each in a process of its own. All that it knows is on the disk: it may be
killed at any moment, and whoever starts it again goes on."""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import hyena_dist
from hyena_dist.checkpoint.directory import is_whole
from hyena_dist.config.errors import one_line
from hyena_dist.config.load import dump_config
from hyena_dist.runtime.files import write_whole
from hyena_dist.runtime.requeue import in_use, requeue_marker
from hyena_dist.runtime.run_lock import RunLock
from hyena_dist.tasks.sweep.file import MetricCommand, Sweep
from hyena_dist.tasks.sweep.places import claim, locked
from hyena_dist.tasks.sweep.point import Point
from hyena_dist.tasks.sweep.results import has_ended, is_divergence, last_error, results
from hyena_dist.tasks.sweep.state import State, ended, read_state, started, write_state

logger = logging.getLogger(__name__)

CONFIG, LOG = "config.yaml", "log.txt"
"""In a point's directory: what its run is started with, and what it says."""
PRETRAIN = (str(Path(hyena_dist.__file__).parent / "cli" / "main.py"), "pretrain")
POLL_SECONDS = 0.2
ORPHAN_SECONDS = 2.0


@dataclass
class _Going:
    """A point whose process runs."""

    point: Point
    state: State
    lock: RunLock
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Bytes of the log that are from earlier starts."""
    slot: int
    deadline: float | None = None
    """When the process is given up, on the clock of this process; None: never."""
    asked: bool = False
    """Whether it was told to stop."""

    @property
    def is_metric(self) -> bool:
        """Whether the process finds the metric of a run that has ended; else it is the run."""
        return self.deadline is not None


@dataclass
class Runner:
    """Runs points.

    Args:
        sweep: says how.
        jobs: points at a time.
        retry: whether points that have failed or diverged run again.
        stop: the reason to stop, once there is one.
        watch: called after every look at the processes.
    """

    sweep: Sweep
    jobs: int = 1
    retry: bool = False
    stop: Callable[[], str | None] = lambda: None
    watch: Callable[[], None] = lambda: None
    busy: list[str] = field(default_factory=list)
    """Points that somebody else runs."""
    _going: list[_Going] = field(default_factory=list)
    _later: dict[str, float] = field(default_factory=dict)
    """When a point may be tried again, on the clock of this process."""

    def run(self, points: Sequence[Point], states: dict[str, State]) -> dict[str, State]:
        """Run what is not finished, in this order; returns the last state of every point.

        Args:
            states: of all points, where they were read before.

        Raises:
            OSError: a state could not be written; the runs were told to stop.
        """
        waiting = [point for point in points if self._has_work(states[point.id])]
        try:
            while (waiting or self._going) and not (self.stop() and not self._going):
                while waiting and len(self._going) < self.jobs and not self.stop():
                    point = self._next(waiting)
                    if point is None:
                        break
                    waiting.remove(point)
                    if not self._start(point):
                        self._postpone(point, waiting)
                if not self._going and waiting and not self._later and not self.stop():
                    self._give_up(waiting)
                    break
                self._look()
        finally:
            self._stop_all()
        return {point.id: read_state(point.directory) or states[point.id] for point in points}

    def _has_work(self, state: State) -> bool:
        if state["status"] in ("failed", "diverged"):
            return self.retry
        return state["status"] != "finished" or _lacks_metric(state, self.sweep.metric)

    def _next(self, waiting: Sequence[Point]) -> Point | None:
        """The first point that can start: a branch waits for the checkpoint that it begins with."""
        self._later = {name: due for name, due in self._later.items() if due > monotonic()}
        return next((point for point in waiting if point.id not in self._later and _can_begin(point)), None)

    def _postpone(self, point: Point, waiting: list[Point]) -> None:
        """Put a point that somebody else has aside: for good where that is another sweep, and for a moment where its
        run has outlived the sweep that started it, which it notices and ends for."""
        if in_use(Path(point.config.train.run_dir)) and not in_use(point.directory):
            self._later[point.id] = monotonic() + ORPHAN_SECONDS
            waiting.append(point)
        else:
            self.busy.append(point.id)

    def _give_up(self, waiting: Sequence[Point]) -> None:
        """Note the branches whose origin has no checkpoint for them: it has not come that far, or did not keep it."""
        for point in waiting:
            assert point.forked_from is not None
            parent = read_state(point.directory.parent / point.forked_from)
            status, error = "planned", f"waits for step {point.fork_at} of {point.forked_from}"
            if parent is not None and parent["status"] == "finished":
                status, error = "failed", (f"{point.forked_from} has kept no checkpoint of step {point.fork_at}: fork "
                                           "it at a step that it has kept, or delete its directory to run it again")
            with locked(point.directory) as lock:
                state = read_state(point.directory)
                if lock is not None and state is not None:
                    write_state(point.directory, ended(state, status, error))

    def _start(self, point: Point) -> bool:
        """Start a point, unless somebody else has ended it meanwhile; False: somebody else has it."""
        lock = claim(point)
        if lock is None:
            return False
        state = read_state(point.directory)
        assert state is not None, "states are written before a run"
        if not self._has_work(state):
            lock.release()
            return True
        if _lacks_metric(state, self.sweep.metric) or has_ended(Path(point.config.train.run_dir),
                                                               point.config.train.steps):
            self._record(point, state, lock)
            return True
        state = started(state)
        write_state(point.directory, state)
        write_whole(point.directory / CONFIG,
                    lambda path: path.write_text(dump_config(point.config), encoding="utf-8"))
        argv = [*(word.replace("{port}", str(_free_port())) for word in self.sweep.launch or (sys.executable,)),
                *PRETRAIN, "--config", str(point.directory / CONFIG)]
        self._spawn(point, state, lock, argv, point.directory / LOG, None)
        return True

    def _spawn(self, point: Point, state: State, lock: RunLock, argv: Sequence[str], log: Path,
               seconds: float | None) -> None:
        slot = next(slot for slot in range(self.jobs) if all(going.slot != slot for going in self._going))
        threads = max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.sweep.ranks))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if self.jobs > 1 and (devices := devices_of(slot, self.sweep.ranks, _visible())):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        try:
            with log.open("ab") as said:  # its own session: a Ctrl-C is this process's, which passes it on
                log_start = said.tell()
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                           start_new_session=True, env=environment)
        except OSError as error:
            self._end(point, state, lock, "failed", f"{argv[0]}: cannot be started ({error.strerror}): correct it in "
                      f"{self.sweep.path}")
            return
        deadline = None if seconds is None else monotonic() + seconds
        self._going.append(_Going(point, state, lock, process, log, log_start, slot, deadline))

    def _look(self) -> None:
        """Wait a moment; then see which processes have ended, and pass on the wish to stop."""
        time.sleep(POLL_SECONDS)
        for going in list(self._going):
            if self.stop() and not going.asked:
                going.process.terminate()
                going.asked = True
            if going.deadline is not None and monotonic() > going.deadline:
                _kill(going.process)
            if going.process.poll() is not None:
                self._going.remove(going)
                (self._metric_ended if going.is_metric else self._run_ended)(going)
        self.watch()

    def _run_ended(self, going: _Going) -> None:
        point, status = going.point, going.process.returncode
        run_dir = Path(point.config.train.run_dir)
        if status == 0 and has_ended(run_dir, point.config.train.steps):
            self._record(point, going.state, going.lock)
        elif going.asked or status < 0 or requeue_marker(run_dir).exists():
            why = f"ended by {signal.Signals(-status).name}" if status < 0 else "stopped before its end"
            self._end(point, going.state, going.lock, "planned", f"{why}: it goes on with the next run of the sweep")
        else:
            error = last_error(going.log, going.log_start) or f"ended with status {status}, and said nothing"
            self._end(point, going.state, going.lock, "diverged" if is_divergence(error) else "failed", error)

    def _record(self, point: Point, state: State, lock: RunLock) -> None:
        """Note the results of a run that has ended; then its metric is found, if there is to be one."""
        try:
            found = results(Path(point.config.train.run_dir), point.config.train.steps)
        except (OSError, ValueError) as error:
            self._end(point, state, lock, "failed", f"its results cannot be read: {one_line(error)}")
            return
        if found["loss"] is None:
            self._end(point, state, lock, "diverged", "its last validation has no finite loss", **found)
            return
        metric = self.sweep.metric
        if metric is None:
            self._end(point, state, lock, "finished", None, **found)
            return
        argv = [word.replace("{run_dir}", point.config.train.run_dir) for word in metric.command]
        log = point.directory / "metric.txt"
        log.unlink(missing_ok=True)
        self._spawn(point, {**started(state), **found}, lock, argv, log, metric.timeout)

    def _metric_ended(self, going: _Going) -> None:
        metric, status = self.sweep.metric, going.process.returncode
        assert metric is not None
        assert going.deadline is not None
        late = monotonic() > going.deadline
        if going.asked or (status < 0 and not late):
            self._end(going.point, going.state, going.lock, "planned", "stopped before its metric was found")
            return
        value = _last_number(going.log)
        if status != 0 or value is None:
            why = (f"took more than {metric.timeout:g} s" if late else f"ended with status {status}" if status else
                   "its last line is no number")
            self._end(going.point, going.state, going.lock, "failed",
                      f"metric {metric.name}: {why}: see {going.log}, and run the sweep with --retry")
            return
        self._end(going.point, going.state, going.lock, "finished", None,
                  metric={"name": metric.name, "value": value})

    def _end(self, point: Point, state: State, lock: RunLock, status: str, error: str | None, **found: Any) -> None:
        try:
            write_state(point.directory, ended(state, status, error, **found))
        finally:
            lock.release()
        logger.info("%s: %s", point.id, f"{status}: {error}" if error else status)

    def _stop_all(self) -> None:
        """After an error of this process: its runs save and end."""
        for going in self._going:
            going.process.terminate()
        for going in self._going:
            going.process.wait()
            going.lock.release()
        self._going.clear()


def _can_begin(point: Point) -> bool:
    """Whether a branch has a checkpoint of its own, or that which it begins with; any other point can."""
    own = Path(point.config.train.run_dir) / "checkpoints"
    origin = point.config.train.origin
    return origin is None or is_whole(origin) or any(map(is_whole, own.glob("step-*")))


def _lacks_metric(state: State, metric: MetricCommand | None) -> bool:
    return (state["status"] == "finished" and metric is not None
            and (state["metric"] or {}).get("name") != metric.name)


def _last_number(path: Path) -> float | None:
    """The number in the last line of a file."""
    try:
        lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        value = json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError):
        return None
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started: they have a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def devices_of(slot: int, ranks: int, visible: Sequence[str]) -> list[str]:
    """The GPUs of the points that run in a place; those of different places are different while there are enough."""
    return [visible[(slot * ranks + rank) % len(visible)] for rank in range(min(ranks, len(visible)))]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
