"""Which source each window of a mixture is of: a pure function of its number, the weights and nothing else.

A window goes to the source with the largest deficit, which is what its weight has earned so far less what it was given.
Weights are whole numbers of 1/SHARES here. While they stay the same every source has exactly its weight in any SHARES
windows from one round number to the next, so the deficits come back and the deal repeats: it is computed once, and the
windows of a source before any number follow without going through those before. What is left of the deficits when
the weights change is carried over, so that many short stretches are together as exact as one long one.

Inside a source its windows come in the source's own order (`WindowOrder`), epoch after epoch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hyena_dist.data.order import Window, WindowOrder

SHARES = 1 << 14
_ENDLESS = 1 << 40
"""More windows than a stage has; a mixture has no epochs of its own."""
_NEVER = -(1 << 60)
"""Deficit of a source without weight."""


def shares(weights: Sequence[float]) -> list[int]:
    """The nearest whole numbers of 1/SHARES that add up to 1: largest remainders first. What has a weight gets at least
    one, so that no source is left out."""
    exact = np.array(weights, dtype=np.float64) / max(weights)
    exact *= SHARES / exact.sum()
    whole = np.maximum(np.floor(exact), np.array(weights) > 0).astype(np.int64)
    while (left := SHARES - int(whole.sum())) != 0:
        step = 1 if left > 0 else -1
        may = whole > 1 if left < 0 else np.array(weights) > 0
        whole[np.where(may, step * (exact - whole), -np.inf).argmax()] += step
    return [int(share) for share in whole]


class Change(NamedTuple):
    """Weights of the sources that hold from a window on."""

    window: int
    weights: tuple[float, ...]


class _Block(NamedTuple):
    """Windows in a row under the same weights: SHARES of them, or all there are."""

    sources: list[int]
    earlier: list[int]
    """How many windows of the block before each are of the same source."""
    counts: np.ndarray
    """int64 [sources]: the windows of each."""


class _Stretch:
    """The windows from one change of the weights to the next.

    Args:
        before: int64 [sources], the windows of each source before the stretch.
        deficits: int64 [sources], at its start, in 1/SHARES windows.
        windows: in it, at most.
    """

    def __init__(self, weights: Sequence[float], before: np.ndarray, deficits: np.ndarray, windows: int) -> None:
        self._shares = np.array(shares(weights), dtype=np.int64)
        self._deficits = np.where(self._shares > 0, deficits, 0)
        self._size, self._windows = min(SHARES, windows), windows
        self._blocks: list[_Block] = []
        self._before = [before]
        """The windows of each source before each block, and behind the last."""
        self._states: list[tuple[int, ...]] = []
        """The deficits at the start of each block."""
        self._repeats: int | None = None
        """The block that comes again behind the last one."""

    def place(self, window: int) -> tuple[int, int]:
        """The source of a window of the stretch, and how many windows of that source come before it."""
        number, at = divmod(window, self._size)
        block, before = self._at(number)
        source = block.sources[at]
        return source, int(before[source]) + block.earlier[at]

    def counts(self, window: int) -> np.ndarray:
        """int64 [sources]: the windows of each source before this window of the stretch."""
        number, at = divmod(window, self._size)
        if not at:
            return self._at(number - 1)[1] + self._at(number - 1)[0].counts if number else self._before[0]
        block, before = self._at(number)
        return before + np.bincount(block.sources[:at], minlength=self._shares.size)

    def deficits(self, window: int) -> np.ndarray:
        """int64 [sources]: the deficits before this window of the stretch."""
        return self._deficits + window * self._shares - SHARES * (self.counts(window) - self._before[0])

    def _at(self, number: int) -> tuple[_Block, np.ndarray]:
        """A block, and the windows of each source before it. Blocks are dealt until one starts as an earlier one did:
        the deficits are bounded, so that happens, as a rule at once."""
        while self._repeats is None and len(self._blocks) <= number:
            self._add_block()
        if self._repeats is None or number < len(self._blocks):
            return self._blocks[number], self._before[number]
        first, last = self._repeats, len(self._blocks)
        rounds, place = divmod(number - first, last - first)
        return self._blocks[first + place], self._before[first + place] + rounds * (
            self._before[last] - self._before[first])

    def _add_block(self) -> None:
        start = len(self._blocks) * self._size
        deficits = self._deficits + start * self._shares - SHARES * (self._before[-1] - self._before[0])
        self._states.append(tuple(deficits.tolist()))
        block = _deal(tuple(self._shares.tolist()), self._states[-1], min(self._size, self._windows - start))
        self._blocks.append(block)
        self._before.append(self._before[-1] + block.counts)
        if len(block.sources) == SHARES:
            state = tuple((deficits + SHARES * (self._shares - block.counts)).tolist())
            self._repeats = self._states.index(state) if state in self._states else None


@lru_cache(maxsize=16)
def _deal(of_sources: tuple[int, ...], deficits: tuple[int, ...], windows: int) -> _Block:
    """Windows in a row under the same weights, each to the source with the largest deficit, of two to the first."""
    parts = np.array(of_sources, dtype=np.int64)
    now = np.where(parts > 0, deficits, _NEVER)
    given, sources, earlier = [0] * parts.size, [], []
    for _ in range(windows):
        now += parts
        source = int(now.argmax())
        now[source] -= SHARES
        sources.append(source)
        earlier.append(given[source])
        given[source] += 1
    return _Block(sources, earlier, np.array(given, dtype=np.int64))


class MixtureOrder:
    """The windows of several sources, as `WindowOrder` has those of one; all are of epoch 0, which has no end.

    Args:
        orders: of the sources; each has a window at least.
        changes: the first at window 0; their windows grow.
    """

    def __init__(self, orders: Sequence[WindowOrder], changes: Sequence[Change]) -> None:
        assert changes[0].window == 0
        assert all(len(change.weights) == len(orders) for change in changes)
        self._orders, self._changes = orders, changes
        self._firsts = [change.window for change in changes]
        self._first_intervals = np.cumsum([0, *(order.lengths.size for order in orders)]).tolist()
        self._stretches: list[_Stretch] = []
        self._start, self._stop = 0, 0  # of the stretch that was used last
        self._last: _Stretch

    def epoch_size(self, epoch: int) -> int:
        """Number of windows of an epoch."""
        return 0 if epoch else _ENDLESS

    def advance(self, epoch: int, index: int, windows: int) -> tuple[int, int]:
        """Epoch and index this many windows on."""
        return epoch, index + windows

    def window(self, epoch: int, index: int) -> Window:
        """A window; its interval is counted over the intervals of all sources. Of a packed one the first piece."""
        return self.pieces(epoch, index)[0]

    def pieces(self, epoch: int, index: int) -> list[Window]:
        """The pieces of a window, which are of the same source."""
        assert not epoch
        source, number = self.place(index)
        order, first = self._orders[source], self._first_intervals[source]
        return [piece._replace(interval=first + piece.interval) for piece in order.pieces(*order.locate(number))]

    def place(self, window: int) -> tuple[int, int]:
        """The source of a window, and how many windows of that source come before it."""
        if not self._start <= window < self._stop:
            self._go_to(window)
        return self._last.place(window - self._start)

    def counts(self, windows: int) -> list[int]:
        """How many of the first windows are of each source."""
        if not self._start <= windows < self._stop:
            self._go_to(windows)
        return self._last.counts(windows - self._start).tolist()

    def epochs(self, windows: int) -> list[float]:
        """How often the first windows have gone through each source."""
        return [order.epochs(count) for order, count in zip(self._orders, self.counts(windows), strict=True)]

    def _go_to(self, window: int) -> None:
        number = bisect_right(self._firsts, window) - 1
        while len(self._stretches) <= number:
            self._add_stretch()
        ends = [*self._firsts[1:], _ENDLESS]
        self._last, self._start, self._stop = self._stretches[number], self._firsts[number], ends[number]

    def _add_stretch(self) -> None:
        number = len(self._stretches)
        change = self._changes[number]
        end = self._firsts[number + 1] if number + 1 < len(self._firsts) else _ENDLESS
        before = deficits = np.zeros(len(self._orders), dtype=np.int64)
        if number:
            last, windows = self._stretches[-1], change.window - self._firsts[number - 1]
            before, deficits = last.counts(windows), last.deficits(windows)
        self._stretches.append(_Stretch(change.weights, before, deficits, end - change.window))
