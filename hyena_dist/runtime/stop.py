"""Stopping on request: a signal that reaches any rank becomes one decision of all ranks, at the same step."""

import time
from collections import deque
from types import TracebackType

import torch
import torch.distributed as dist

from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.signals import PROCESS, REASONS, STARTED, TIME_IS_UP, Signals

_LONG_STEP_MILLISECONDS = 1000
SPARE_SECONDS, SPARE_SHARE = 120.0, 0.1
"""What is kept of a time limit for the end of the run: at most so long, and at most this share of it."""


class StopSignal:
    """Lets all ranks agree on the signals that reach any of them (`signals`), while its context is entered, in the
    main thread.

    Launchers signal one rank up to 30 seconds before the others (deepspeed), or one rank only, so no rank may act on
    its own signal.

    Args:
        axis: all ranks, over gloo, so that the answer waits for no device; collectives on it are of the main thread.
        seconds: what this start of the program may take, with its last save; None: as long as it likes.
    """

    def __init__(self, axis: Axis, *, seconds: float | None = None) -> None:
        self._axis, self._seconds = axis, seconds
        self.save_seconds = 0.0
        """What a save takes, once there was one."""
        self._gaps: deque[float] = deque(maxlen=20)
        """Seconds between the latest calls of `agreed`: what a step takes."""
        self._signals = PROCESS
        self._own = False
        self._work: dist.Work | None = None
        self._sums = torch.zeros(2, dtype=torch.int64)
        self._wait_now = False
        self._last_call: float | None = None

    def __enter__(self) -> "StopSignal":
        if not self._signals.installed:
            self._signals, self._own = Signals().install(), True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._own:
            self._signals.uninstall()
            self._own = False
        if self._work is not None and error is None:  # after an error a peer may never answer
            self._work.wait()
        self._work = None

    def request(self, reason: str) -> None:
        """Ask for a stop, one of `REASONS`; from any thread. The first to ask is remembered."""
        self._signals.request(reason)

    @property
    def requested(self) -> str | None:
        """Why this rank was asked to stop, even when its main thread is stuck; for any thread. Not for decisions of
        the loop: the other ranks may not know yet."""
        return self._signals.reason

    def settled(self) -> None:
        """There is a step to be saved, or all ranks stop before it: this one no longer ends by itself."""
        self._signals.until_first_step(None)

    def agreed_now(self) -> str | None:
        """As `agreed`, of this call, however long that takes. Collective; not while an `agreed` is under way."""
        reason = self.requested
        if self._axis.size == 1:
            return reason
        code = torch.tensor(0 if reason is None else 1 + REASONS.index(reason))
        dist.all_reduce(code, dist.ReduceOp.MAX, group=self._axis.group)
        return REASONS[int(code) - 1] if code else None

    def agreed(self) -> str | None:
        """Why all ranks stop now, the same on every rank; None: go on. Collective: once per optimizer step.

        The answer is that of the call before, so that nobody waits for a peer; while steps take longer than a second it
        is of this call, because a launcher kills 30 seconds after its signal.
        """
        now = time.monotonic()
        gap = 0.0 if self._last_call is None else now - self._last_call
        self._last_call = now
        self._gaps.append(gap)
        self._look_at_the_time(now)
        if self._axis.size == 1:
            return self.requested
        elapsed = int(1000 * gap)
        answer = self._answer() if self._work is not None else None
        if answer is None:
            reason = self.requested
            self._sums = torch.tensor([0 if reason is None else 1 + REASONS.index(reason), elapsed])
            self._work = dist.all_reduce(self._sums, dist.ReduceOp.MAX, group=self._axis.group, async_op=True)
            if self._wait_now:
                answer = self._answer()
        return answer

    def _look_at_the_time(self, now: float) -> None:
        """Ask for a stop where another step and a save might not end in time. Twice what they took, for they vary; and
        before the first save nobody knows how long one takes."""
        if self._seconds is None or self.requested is not None:
            return
        spare = max(min(SPARE_SECONDS, SPARE_SHARE * self._seconds), 2 * (max(self._gaps) + self.save_seconds))
        if now - STARTED >= self._seconds - spare:
            self.request(TIME_IS_UP)

    def _answer(self) -> str | None:
        assert self._work is not None
        self._work.wait()
        self._work = None
        code, elapsed = self._sums.tolist()
        self._wait_now = elapsed > _LONG_STEP_MILLISECONDS  # of the slowest rank, so the same on all
        return REASONS[code - 1] if code else None
