"""What each rank says, in a file of its own, and which rank is slow."""

import logging
import socket
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.errors import UserError
from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.files import writing
from hyena_dist.runtime.peers import name_places

logger = logging.getLogger(__name__)

STEPS_COMPARED = 50
SECONDS_COMPARED = 60.0
SLOW_FACTOR = 1.5
SLOW_SECONDS = 0.02
"""A rank is slow when it needs this factor of the ranks' median, and this many seconds more, per step."""


class RankLog:
    """While entered, everything logged on this rank from INFO on, warnings, and an error's traceback are appended to
    run_dir/logs/rank-00000.log. What goes to the terminal stays as it was.

    Raises:
        OSError: the file cannot be opened. Later failures to write are passed over: a log must not end a run.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / "logs" / f"rank-{rank:05d}.log"

    def __enter__(self) -> "RankLog":
        root = logging.getLogger()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _QuietFileHandler(self.path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._levels = [(handler, handler.level) for handler in root.handlers]
        self._root_level = root.level
        for handler, level in self._levels:  # the root's level held back what the terminal should not show
            handler.setLevel(max(level, root.level))
        root.setLevel(min(root.level, logging.INFO))
        root.addHandler(self._handler)
        logging.captureWarnings(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        root = logging.getLogger()
        if error is not None and kind is not None:
            exc_info = None if isinstance(error, UserError) else (kind, error, trace)  # theirs is one line
            self._handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, "the run ended: %s",
                                                   (error or kind.__name__,), exc_info))
        logging.captureWarnings(False)
        root.removeHandler(self._handler)
        root.setLevel(self._root_level)
        for handler, level in self._levels:
            handler.setLevel(level)
        self._handler.close()


class _QuietFileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk: what is lost is a log line, and the terminal still has it."""

    def close(self) -> None:
        """What could not be written is tried once more, and given up: the run ends with the error that it has."""
        with suppress(OSError):
            super().close()


class StepTimes:
    """Compares what ranks need for their own part of a step; the first rank warns of one that holds up the others.

    Args:
        axis: all ranks, over gloo; collectives on it are of the main thread.
        together: how many ranks in a row wait for each other in a forward pass, as context ranks do.
        steps: how many steps a comparison spans; fewer when they would take more than a minute.
    """

    def __init__(self, axis: Axis, *, together: int = 1, steps: int = STEPS_COMPARED) -> None:
        self._axis, self._together, self._most = axis, together, steps
        self._steps = min(steps, 5)  # a first, early comparison shows how long steps are
        self._rows: list[tuple[float, float, float]] = []
        self._work: dist.Work | None = None
        self._gathered: list[Tensor] = []
        self._last_add: float | None = None
        self._named: tuple[tuple[int, ...], str] | None = None
        self._hosts = [socket.gethostname()] * axis.size
        if axis.size > 1:
            dist.all_gather_object(self._hosts, socket.gethostname(), group=axis.group)

    def add(self, *, loading: float, forward: float) -> None:
        """This rank's seconds in one optimizer step. Collective, for every step, and waits for nobody.

        Args:
            loading: waiting for the batches.
            forward: of the device, before the first collective over data ranks.
        """
        if self._axis.size == 1:
            return
        now = time.monotonic()
        if self._work is not None:  # begun in the step before
            self._compare()
        if self._last_add is not None:  # the first step compiles
            self._rows.append((loading, forward, now - self._last_add))
        self._last_add = now
        if len(self._rows) >= self._steps:
            own = torch.tensor(self._rows, dtype=torch.float64).median(dim=0).values
            self._rows = []
            self._gathered = [torch.empty_like(own) for _ in range(self._axis.size)]
            self._work = dist.all_gather(self._gathered, own, group=self._axis.group, async_op=True)

    def _compare(self) -> None:
        assert self._work is not None
        self._work.wait()
        self._work = None
        ranks = torch.stack(self._gathered)  # [ranks, 3], the same on every rank
        self._steps = max(1, min(self._most, int(SECONDS_COMPARED / max(float(ranks[:, 2].max()), 1e-9))))
        found = slow_ranks(ranks[:, 0].tolist(), ranks[:, 1].tolist(), together=self._together)
        if found is not None and (found.ranks, found.part) != self._named and self._axis.rank == 0:
            who = name_places(found.ranks, dict(enumerate(self._hosts)))
            one = len(found.ranks) == 1
            logger.warning("%s %s slow: %s takes %s %.3f s per step, %.1f times the ranks' median of %.3f s, and all "
                           "wait for %s", who, "is" if one else "are", found.part, "it" if one else "them",
                           found.seconds, found.seconds / max(found.median, 1e-9), found.median,
                           "it" if one else "them")
        self._named = None if found is None else (found.ranks, found.part)


@dataclass(frozen=True)
class Slow:
    """Ranks that hold up the others: one, or all that wait for each other in a forward pass."""

    ranks: tuple[int, ...]
    part: str
    seconds: float
    """Their median per step."""
    median: float
    """The ranks' median of that."""


def slow_ranks(loading: list[float], forward: list[float], *, together: int = 1) -> Slow | None:
    """The ranks that need the most seconds more than the ranks' median, if that is much.

    Args:
        loading: seconds by rank.
        forward: the same, with what a rank waits in it for the others of its block.
        together: ranks of a block, in a row. The least of their forward passes is what the block needs: the others have
            waited longer, for instance because they began earlier.
    """
    blocks = [tuple(range(first, first + together)) for first in range(0, len(forward), together)]
    parts: list[tuple[str, list[tuple[int, ...]], list[float]]] = [
        ("loading data", [(rank,) for rank in range(len(loading))], loading),
        ("forward", blocks, [min(forward[rank] for rank in block) for block in blocks])]
    worst = None
    for part, which, seconds in parts:
        # The lower of the middle two: of two ranks the faster is the measure.
        slow = Slow(which[seconds.index(max(seconds))], part, max(seconds), statistics.median_low(seconds))
        extra = slow.seconds - slow.median
        if slow.seconds > SLOW_FACTOR * slow.median and extra > SLOW_SECONDS:
            if worst is None or extra > worst.seconds - worst.median:
                worst = slow
    return worst
