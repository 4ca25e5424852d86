"""Watches what the main thread cannot while it waits in a collective: the launcher, the peers, a stop that hangs."""

import logging
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import psutil
import torch.distributed as dist

from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.launcher import collective_timeout, launcher_processes
from hyena_dist.runtime.signals import LAUNCHER_GONE
from hyena_dist.runtime.stop import StopSignal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the watchdog waits, in seconds."""

    period: float = 1.0
    """Between two looks."""
    peer: float = 5.0
    """After a peer has died, for this rank's own error with its traceback."""
    stop: float = 20.0
    """For the next step once a stop was asked for: a launcher kills 30 seconds after its signal. Runs whose steps take
    longer get twice the longest of the last ones."""
    start: float = 600.0
    """For the first step, which compiles."""
    still: float = 10.0
    """Until a peer that was stopped is named."""
    note: float = 60.0
    """Until a wait is noted in the log."""
    batch: float = field(default_factory=lambda: 0.8 * collective_timeout().total_seconds())
    """For what this rank alone waits for: less than the time-out of a collective, after which its peers, who wait for
    it, could only say that they did."""


T = TypeVar("T")


class _End:
    """Of an iterator."""


_END = _End()


@dataclass(frozen=True)
class _Peer:
    rank: int
    host: str
    process: psutil.Process | None
    """None: ended before it could be looked at."""


@dataclass
class _Wait:
    """Something that this rank alone waits for."""

    what: str
    remedy: str
    since: float
    noted: bool = False


class Watchdog:
    """A thread per rank that ends a rank which can only hang.

    - The launcher has ended: a stop is requested, so that orphans save and end.
    - A peer of this machine has ended without leaving this context: this rank's main thread gets some seconds to fail
      by itself, as gloo lets it; then the process ends with status 1 and a line that names the peer.
    - A peer of this machine was stopped (SIGSTOP, a debugger): a line names it.
    - A stop was asked for and no step ends: the process ends with status 1.
    - What this rank said it waits for has not come in its time: the same, with a line that has the remedy.

    Leaving the context without an error is collective: it waits for all ranks, and says goodbye.

    Args:
        axis: all ranks, over gloo, the one of `stop`.
        stop: entered before and left after this context.
        launchers: of this process; None: as found.
    """

    def __init__(self, axis: Axis, stop: StopSignal, *, launchers: Sequence[psutil.Process] | None = None,
                 patience: Patience | None = None) -> None:
        self._axis, self._stop, self._patience = axis, stop, patience or Patience()
        self._launchers = launcher_processes() if launchers is None else list(launchers)
        self._peers: list[_Peer] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.main_thread()
        self._gaps: deque[float] = deque(maxlen=20)
        self._last_beat = time.monotonic()
        self._allowed = self._patience.start
        self._stop_seen: float | None = None
        self._death_seen: float | None = None
        self._still: dict[int, float] = {}
        """When each peer that is stopped was first seen so; infinite once it was named."""
        self._wait: _Wait | None = None

    def __enter__(self) -> "Watchdog":
        self._peers = _local_peers(self._axis)
        self.beat(allow=self._patience.start)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if error is None and self._axis.size > 1:
                dist.barrier(group=self._axis.group)  # still watched: a peer may die on its way here
        finally:
            self._over.set()
            self._thread.join()

    def beat(self, *, step: bool = False, allow: float = 0.0) -> None:
        """Something is done.

        Args:
            step: it was a training step; the longest of the last ones tell how long one may take.
            allow: seconds that what comes next may take, a save for example, beyond the usual.
        """
        now = time.monotonic()
        if step and not self._allowed:
            self._gaps.append(now - self._last_beat)
        self._last_beat, self._allowed = now, allow

    @contextmanager
    def waiting_for(self, what: str, *, remedy: str) -> Iterator[None]:
        """A context in which this rank waits for something that no peer knows of, a batch for example; when it has not
        come in most of the time that a collective may take, the process ends, and says what to do."""
        self._wait = _Wait(what, remedy, time.monotonic())
        try:
            yield
        finally:
            self._wait = None

    def each(self, items: Iterable[T], what: str, *, remedy: str) -> Iterator[T]:
        """The items, each one waited for."""
        iterator = iter(items)
        while True:
            with self.waiting_for(what, remedy=remedy):
                item = next(iterator, _END)
            if isinstance(item, _End):
                return
            yield item

    def _watch(self) -> None:
        while not self._over.wait(self._patience.period):
            self._look_at_launchers()
            self._look_at_peers()
            self._look_for_still_peers()
            self._look_at_wait()
            self._look_at_stop()

    def _look_at_launchers(self) -> None:
        for launcher in self._launchers:
            if not _alive(launcher):
                logger.error("the launcher (process %d) has ended: this rank saves and ends", launcher.pid)
                self._stop.request(LAUNCHER_GONE)
                self._launchers = []
                break

    def _look_at_peers(self) -> None:
        dead = next((peer for peer in self._peers if not _alive(peer.process)), None)
        if dead is None:
            return
        now = time.monotonic()
        if self._death_seen is None:
            self._death_seen = now
        if now - self._death_seen >= self._patience.peer:
            pid = "" if dead.process is None else f", process {dead.process.pid}"
            self._end(f"rank {dead.rank} (host {dead.host}{pid}) has ended, and this rank waits for it: its log says "
                      "why; resume with the same command")

    def _look_for_still_peers(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if not _is_stopped(peer.process):
                self._still.pop(peer.rank, None)
            elif now - self._still.setdefault(peer.rank, now) >= self._patience.still:
                self._still[peer.rank] = math.inf
                pid = 0 if peer.process is None else peer.process.pid
                logger.error("rank %d (host %s, process %d) stands still, and all wait for it: somebody stopped it; "
                             "kill -CONT %d lets it go on", peer.rank, peer.host, pid, pid)

    def _look_at_wait(self) -> None:
        wait, now = self._wait, time.monotonic()
        if wait is None:
            return
        if now - wait.since >= self._patience.batch:
            self._end(f"{wait.what} did not come for {self._patience.batch:.0f} s: {wait.remedy}", stack=False)
        elif now - wait.since >= self._patience.note and not wait.noted:
            wait.noted = True
            logger.warning("this rank waits for %s since %.0f s", wait.what, now - wait.since)

    def _look_at_stop(self) -> None:
        reason, now = self._stop.requested, time.monotonic()
        if reason is None:
            return
        if self._stop_seen is None:
            self._stop_seen = now
            logger.warning("%s: the run saves and stops", reason)
        limit = max(self._patience.stop, self._allowed, 2 * max(self._gaps, default=0.0))
        if now - max(self._stop_seen, self._last_beat) >= limit:
            wait = self._wait
            because = "" if wait is None else f"; it waits for {wait.what}: {wait.remedy}"
            self._end(f"{reason}, and no step ended for {limit:.0f} s: this rank ends without a save; resume with the "
                      f"same command{because}")

    def _end(self, why: str, *, stack: bool = True) -> None:
        """End the process, whatever its main thread waits for."""
        frame = sys._current_frames().get(self._main.ident or 0) if stack else None
        where = "" if frame is None else "\nThe main thread was at:\n" + "".join(traceback.format_stack(frame))
        # The main thread may be stuck inside a log handler, with its lock.
        said = threading.Thread(target=logger.critical, daemon=True, args=("%s%s", why, where))
        said.start()
        said.join(2.0)
        os._exit(1)


def _local_peers(axis: Axis) -> list[_Peer]:
    """The other ranks whose processes this one can see."""
    if axis.size == 1:
        return []
    own = (_machine(), socket.gethostname(), os.getpid(), _started(os.getpid()))
    ranks: list[tuple[str, str, int, int]] = [own] * axis.size
    dist.all_gather_object(ranks, own, group=axis.group)
    return [_Peer(rank, host, _process(pid, created)) for rank, (machine, host, pid, created) in enumerate(ranks)
            if rank != axis.rank and machine == own[0]]


def _machine() -> str:
    """The same where a process number means the same process: one boot of one kernel, one namespace of numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int, started: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if _started(pid) == started else None
    except (psutil.NoSuchProcess, OSError):
        return None


def _started(pid: int) -> int:
    """When a process was started, in ticks since the boot: no clock that is set while the ranks start changes it."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])


def _is_stopped(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _alive(process: psutil.Process | None) -> bool:
    """Not ended, not a zombie, and not another process of the same number."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # there, though not ours
        return True
