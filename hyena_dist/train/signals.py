"""Stopping on request: a signal that reaches any rank becomes one decision of all ranks, at the same step."""

import json
import os
import signal
import time
import weakref
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from hyena_dist.engine.launch import job_id
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.files import write_whole

EXIT_REQUEUE = 85
"""Exit status of a run that saved and stopped before its end. A launcher may change it: the marker is the truth."""

LAUNCHER_GONE = "launcher gone"
REASONS = ("SIGUSR1", "SIGTERM", LAUNCHER_GONE)
"""What a run stops for. When ranks have several, the last of this order is the answer of all."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LONG_STEP_MILLISECONDS = 1000


class StopSignal:
    """Catches SIGTERM and SIGUSR1 while its context is entered, in the main thread, and lets all ranks agree.

    Launchers signal one rank up to 30 seconds before the others (deepspeed), or one rank only, so no rank may act on
    its own signal. Only the first counts: launchers repeat themselves while a run saves.

    Args:
        axis: all ranks, over gloo, so that the answer waits for no device; collectives on it are of the main thread.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._reason: str | None = None
        self._work: dist.Work | None = None
        self._sums = torch.zeros(2, dtype=torch.int64)
        self._wait_now = False
        self._last_call: float | None = None
        self._read_end = -1

    def __enter__(self) -> "StopSignal":
        # Python calls a handler between two bytecodes, so not while the main thread waits in a collective; the byte in
        # the pipe is there at once, for the watchdog's thread.
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        os.register_at_fork(after_in_child=_disown(weakref.ref(self)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._read_end)
        os.close(self._write_end)
        self._read_end = -1
        if self._work is not None and error is None:  # after an error a peer may never answer
            self._work.wait()
        self._work = None

    def request(self, reason: str) -> None:
        """Ask for a stop, one of `REASONS`; from any thread. The first to ask is remembered."""
        REASONS.index(reason)
        self._reason = self._reason or reason

    @property
    def requested(self) -> str | None:
        """Why this rank was asked to stop, even when its main thread is stuck; for any thread. Not for decisions of
        the loop: the other ranks may not know yet."""
        if self._read_end >= 0 and self._reason is None:
            try:
                received = os.read(self._read_end, 64)
            except BlockingIOError:
                received = b""
            for number in received:
                if number in _SIGNALS:
                    self.request(signal.Signals(number).name)
        return self._reason

    def agreed(self) -> str | None:
        """Why all ranks stop now, the same on every rank; None: go on. Collective: once per optimizer step.

        The answer is that of the call before, so that nobody waits for a peer; while steps take longer than a second it
        is of this call, because a launcher kills 30 seconds after its signal.
        """
        if self._axis.size == 1:
            return self.requested
        now = time.monotonic()
        elapsed = 0 if self._last_call is None else int(1000 * (now - self._last_call))
        self._last_call = now
        answer = self._answer() if self._work is not None else None
        if answer is None:
            reason = self.requested
            self._sums = torch.tensor([0 if reason is None else 1 + REASONS.index(reason), elapsed])
            self._work = dist.all_reduce(self._sums, dist.ReduceOp.MAX, group=self._axis.group, async_op=True)
            if self._wait_now:
                answer = self._answer()
        return answer

    def _answer(self) -> str | None:
        assert self._work is not None
        self._work.wait()
        self._work = None
        code, elapsed = self._sums.tolist()
        self._wait_now = elapsed > _LONG_STEP_MILLISECONDS  # of the slowest rank, so the same on all
        return REASONS[code - 1] if code else None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)


def _disown(stop: "weakref.ref[StopSignal]") -> Any:
    def in_child() -> None:
        """A forked child has the same pipe: a signal to it would count as one to this rank."""
        entered = stop()
        if entered is not None and entered._read_end >= 0:
            signal.set_wakeup_fd(-1)
    return in_child


def requeue_marker(run_dir: Path) -> Path:
    """The file that is there when the run stopped before its end and can be started again."""
    return run_dir / "requeue.json"


def write_requeue(run_dir: Path, reason: str, step: int) -> None:
    """Say that the run was saved at `step` and stopped; for the first rank, after the save, before any rank ends.

    Raises:
        OSError: it could not be written.
    """
    content = {"signal": reason, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": job_id()}
    write_whole(requeue_marker(run_dir), lambda path: path.write_text(json.dumps(content) + "\n"))


def clear_requeue(run_dir: Path) -> None:
    """Remove the marker; for the first rank of a run that starts."""
    requeue_marker(run_dir).unlink(missing_ok=True)
