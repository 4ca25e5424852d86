"""How far a run is: a bar on a terminal, now and then a line in the log without one."""

import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.train.wording import score

T = TypeVar("T", covariant=True)


class Countable(Protocol[T]):
    """What can be gone through, and has a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T]: ...


logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 15
"""Without a terminal the bar is a line in the log, this often."""


class RunProgress:
    """Of a run that has done `done` of `total` steps; and of each validation while it lasts."""

    def __init__(self, done: int, total: int) -> None:
        self._total, self._start, self._first = total, time.monotonic(), done
        self._last_log = 0.0
        self._val = ""
        self._bar = Progress(TextColumn("{task.fields[unit]}"), MofNCompleteColumn(), BarColumn(),
                             TextColumn("{task.description}"), TimeRemainingColumn(), console=Console(file=sys.stderr),
                             disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=total, completed=done, unit="step")
        self._bar.start()

    def train(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """A step was done."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text + self._val)
        if self._bar.disable and (self._is_time() or step == self._total):
            left = (time.monotonic() - self._start) / max(1, step - self._first) * (self._total - step)
            logger.info("step %d/%d  %s  %.0f s left", step, self._total, text, left)
            self._last_log = time.monotonic()

    def val(self, step: int, what: str, value: float) -> None:
        """A validation was measured: its perplexity, or its loss."""
        self._val = f"  val {what} {score(value)}"
        if self._bar.disable:
            logger.info("step %d/%d%s", step, self._total, self._val)

    def validating(self, batches: Countable[T]) -> Iterator[T]:
        """The batches of a validation, with its own bar, or lines, while they are taken."""
        task = self._bar.add_task("", total=len(batches), unit="validation batch")
        self._last_log = time.monotonic()  # a short validation says nothing but its result
        try:
            for done, batch in enumerate(batches):
                if self._bar.disable and self._is_time():
                    logger.info("validation: batch %d/%d", done, len(batches))
                    self._last_log = time.monotonic()
                yield batch
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def _is_time(self) -> bool:
        return time.monotonic() - self._last_log > LOG_INTERVAL_SECONDS
