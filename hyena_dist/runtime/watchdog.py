"""Watches what the main thread cannot while it waits in a collective: the launcher, the peers, a stop that hangs."""

import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store as get_default_store

from hyena_dist.config.errors import first_sentence
from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.heartbeat import CUT, DONE, ENDED, FAILED, FOLLOWED, UNREACHABLE_SECONDS, Heartbeat, describe
from hyena_dist.runtime.launcher import collective_timeout, launcher_processes
from hyena_dist.runtime.peers import Peer, gather_peers, is_alive, name_places
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
    """Until a peer that was stopped, or that says nothing, is named."""
    unreachable: float = UNREACHABLE_SECONDS
    """Until a machine that does not answer is lost."""
    blame: float = 3.0
    """For the news of which peer is gone, after a collective failed."""
    note: float = 60.0
    """Until a wait is noted in the log."""
    batch: float = field(default_factory=lambda: 0.8 * collective_timeout().total_seconds())
    """For what this rank alone waits for: less than the time-out of a collective, after which its peers, who wait for
    it, could only say that they did."""


T = TypeVar("T")


class _End:
    """Of an iterator."""


_END = _End()


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
    - A peer has ended without leaving this context, or its machine cannot be reached: this rank's main thread gets some
      seconds to fail by itself, as gloo lets it; then the process ends with status 1 and a line that names the peer.
    - A peer was stopped (SIGSTOP, a debugger), or has said nothing for some seconds: a line names it. It may go on.
    - A stop was asked for and no step ends: the process ends with status 1.
    - What this rank said it waits for has not come in its time: the same, with a line that has the remedy.

    What happens on another machine is known by `heartbeat`. Leaving the context without an error is collective: it
    waits for all ranks, and says goodbye. Where a collective fails because a peer is gone, or did not come to it in
    time, leaving raises what names the peer, for the collective's own error has an address at most.

    Args:
        axis: all ranks, over gloo, the one of `stop`.
        stop: entered before and left after this context.
        launchers: of this process; None: as found.
    """

    def __init__(self, axis: Axis, stop: StopSignal, *, launchers: Sequence[psutil.Process] | None = None,
                 patience: Patience | None = None) -> None:
        self._axis, self._stop, self._patience = axis, stop, patience or Patience()
        self._launchers = launcher_processes() if launchers is None else list(launchers)
        self._peers: list[Peer] = []
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
        self._silent: set[int] = set()
        """Peers of other machines of which it was said that they say nothing."""
        self._wait: _Wait | None = None

    def __enter__(self) -> "Watchdog":
        """Raises ConnectionError: a peer is gone already."""
        everybody = gather_peers(self._axis)
        self._peers = [peer for peer in everybody if peer.local and peer.rank != self._axis.rank]
        self._everybody = everybody
        self._heartbeat = Heartbeat(self._axis, everybody, unreachable=self._patience.unreachable)
        self._heartbeat.connect()
        self.beat(allow=self._patience.start)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Raises ConnectionError: the error is of a collective that failed because of a peer, which this one names."""
        word = FAILED
        try:
            if error is None and self._axis.size > 1:
                dist.barrier(group=self._axis.group)  # still watched: a peer may die on its way here
            word = DONE if error is None else FAILED
            if error is not None and _is_of_a_collective(error):
                if (why := self._blame()) is not None:
                    word = FOLLOWED
                    raise ConnectionError(why) from error
                if (why := self._absent()) is not None:
                    raise ConnectionError(f"{why} ({first_sentence(error)})") from error
        finally:
            self._heartbeat.say(word)
            self._over.set()
            self._heartbeat.wake()
            self._thread.join()
            self._heartbeat.close()

    def _blame(self) -> str | None:
        """Which peer is gone, when a collective has failed: its end may be heard of a moment later."""
        deadline = time.monotonic() + self._patience.blame
        while True:
            lost = self._lost()
            known = describe(lost, self._everybody)
            certain = any(how != FOLLOWED and not how.startswith(CUT) for how in lost.values())
            if time.monotonic() > deadline or (known and certain):
                return known
            time.sleep(0.05)

    def _absent(self) -> str | None:
        """Who did not come to a collective whose time was over, though no rank has ended: each that waited says so in
        the store, and a moment later the others are known. None: the store is gone."""
        try:
            store = dist.PrefixStore("waited in vain", get_default_store())
            store.set_timeout(timedelta(seconds=10))
            store.set(str(self._axis.rank), "")
            time.sleep(self._patience.blame)
            absent = [rank for rank in range(self._axis.size) if not store.check([str(rank)])]
        except (RuntimeError, ValueError):
            return None
        hosts = {peer.rank: peer.host for peer in self._everybody}
        if not absent:
            return (f"all ranks waited for each other in vain: look at the network between "
                    f"{', '.join(sorted(set(hosts.values())))}, and resume with the same command")
        pids = ", ".join(f"py-spy dump --pid {self._everybody[rank].pid}" for rank in absent[:2])
        return (f"{name_places(absent, hosts)} did not come to where this rank waited: stuck or far too slow; see "
                f"{'its log' if len(absent) == 1 else 'their logs'} and, if still there, {pids}; resume with the same "
                "command")

    def _lost(self) -> dict[int, str]:
        """What became of each rank that is gone, of this machine or of others."""
        ended = {peer.rank: ENDED for peer in self._peers if not peer.alive}
        return ended | dict(self._heartbeat.lost)

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
        while not self._over.is_set():
            self._heartbeat.listen(self._patience.period)
            if self._over.is_set():
                return
            self._look_at_launchers()
            self._look_at_peers()
            self._look_for_still_peers()
            self._look_for_silent_peers()
            self._look_at_wait()
            self._look_at_stop()

    def _look_at_launchers(self) -> None:
        for launcher in self._launchers:
            if not is_alive(launcher):
                logger.error("the launcher (process %d) has ended: this rank saves and ends", launcher.pid)
                self._stop.request(LAUNCHER_GONE)
                self._launchers = []
                break

    def _look_at_peers(self) -> None:
        why = describe(self._lost(), self._everybody)
        if why is None:
            return
        now = time.monotonic()
        if self._death_seen is None:
            self._death_seen = now
        if now - self._death_seen >= self._patience.peer:
            self._heartbeat.say(FOLLOWED)
            self._end(why)

    def _look_for_still_peers(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if not peer.stopped:
                self._still.pop(peer.rank, None)
            elif now - self._still.setdefault(peer.rank, now) >= self._patience.still:
                self._still[peer.rank] = math.inf
                logger.error("%s stands still, and all wait for it: somebody stopped it; kill -CONT %d lets it go on",
                             peer, peer.pid)

    def _look_for_silent_peers(self) -> None:
        """Of other machines. To hear nothing ends no run: the kernels say when a machine is gone."""
        silent = self._heartbeat.silent(self._patience.still)
        for rank, seconds in silent.items():
            if rank not in self._silent:
                # Of others than the first rank the terminal shows errors only: it has heard this once.
                level = logging.ERROR if 0 in (rank, self._axis.rank) else logging.WARNING
                logger.log(level, "%s has said nothing for %.0f s, and all wait for it: it was stopped (kill -CONT %d "
                                  "there lets it go on), holds its interpreter, or the network to its host is slow or "
                                  "down", self._everybody[rank], seconds, self._everybody[rank].pid)
        for rank in self._silent - silent.keys() - self._heartbeat.lost.keys():
            logger.warning("%s is heard of again", self._everybody[rank])
        self._silent = set(silent)

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


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether gloo or NCCL raised it; torch has no type of its own for gloo's."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
