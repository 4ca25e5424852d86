"""Work that other processes do, with the results in the order of the work: the same bytes whatever their number."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
MOST_BYTES = 1 << 30
"""Of work that is under way; one piece may be larger."""


def _start(parent: int) -> None:
    """What a worker does first: Ctrl-C is for its parent, SIGTERM ends it at once, whatever its parent does of it, and
    when that is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Crew:
    """Does work and hands on what comes of it.

    Args:
        workers: processes beside this one; with 1 this one does the work itself.
    """

    def __init__(self, workers: int = 1):
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None], int]] = deque()
        self._bytes = 0
        if workers > 1:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start, (os.getpid(),))
            self._pool.submit(os.getpid).result()  # all fork now, before a progress bar has a thread

    def do(self, work: Callable[..., Result], *arguments: Any, size: int, then: Callable[[Result], None]) -> None:
        """Do `work(*arguments)`, and later call `then` with its result; in the order of the calls.

        Args:
            size: bytes of the arguments.

        Raises:
            BrokenProcessPool: a worker was ended from outside.
        """
        if self._pool is None:
            then(work(*arguments))
            return
        while self._waiting and (self._bytes + size > MOST_BYTES or self._waiting[0][0].done()):
            self._take()
        self._waiting.append((self._pool.submit(work, *arguments), then, size))
        self._bytes += size

    def _take(self) -> None:
        future, then, size = self._waiting.popleft()
        self._bytes -= size
        then(future.result())

    def finish(self) -> None:
        """Hand on all that is under way."""
        while self._waiting:
            self._take()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
