"""What is held out and also trains, by samples of all that a build reads."""

from typing import NamedTuple

import numpy as np

from hyena_dist.data.order import mix
from hyena_dist.data.sketch import ONE_IN
from hyena_dist.data.splits import SPLITS

MOST = 1 << 26
"""Samples that are held, of 8 bytes; beyond it every second is let go, and so on."""


class Shared(NamedTuple):
    """Sampled 32-mers that are held out, and how many of them train too."""

    held_out: int
    trained: int


class Copies(NamedTuple):
    """Windows of 256 bases that come again, on either strand."""

    one_in: int
    """Windows are those at one place in so many."""
    windows: dict[str, int]
    """All that were looked at, of each split."""
    within: dict[str, int]
    """Those that came before in the same split."""
    across: dict[str, int]
    """Those of validation and of test that also train."""
    first: tuple[int, int] | None
    """Where the first of these is held out, and where it trains; in the concatenation of all contigs."""


class Samples:
    """Samples of what trains and of what is held out, thinned where they are too many to be held."""

    def __init__(self) -> None:
        self._columns: list[list[np.ndarray]] = [[np.zeros(0, kind)] for kind in
                                                 (np.uint64, np.uint64, np.uint64, np.int64)]
        """32-mers that train, those that are held out, windows and their places."""
        self._size, self._rate = 0, 1

    def add(self, train_words: np.ndarray, held_words: np.ndarray, windows: np.ndarray, places: np.ndarray) -> None:
        """Take samples.

        Args:
            windows: hashes, uint64 [n].
            places: of each its first base in the concatenation of all contigs, times 4, and the number of its split.
        """
        self._take([train_words, held_words, windows, places])
        while self._size > MOST:
            self._rate *= 2
            held = [np.concatenate(column) for column in self._columns]
            self._columns, self._size = [[], [], [], []], 0
            self._take(held)

    def _take(self, samples: list[np.ndarray]) -> None:
        """Hold one of `rate`, chosen by what they are, so that all copies of one are held or none."""
        kept = [mix(column) % np.uint64(self._rate) == 0 for column in samples[:3]] if self._rate > 1 else \
            [slice(None)] * 3
        for column, values, rows in zip(self._columns, samples, [*kept, kept[2]], strict=True):
            column.append(values[rows])
        self._size += sum(column[-1].size for column in self._columns)

    def shared(self) -> Shared:
        """Of the 32-mers of all that was taken."""
        trained, held = (_distinct(np.sort(np.concatenate(self._columns[number]))) for number in (0, 1))
        return Shared(held.size, int(_are_in(held, trained).sum()))

    def copies(self) -> Copies:
        """Of the windows of all that was taken."""
        windows, places = (np.concatenate(column) for column in self._columns[2:])
        order = np.lexsort((places, windows))
        windows, places = windows[order], places[order]
        splits = places & 3
        counts = {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)}
        within, across, first = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS[1:], 0), None
        trained = _distinct(windows[splits == 0])
        for number, split in enumerate(SPLITS):
            own = windows[splits == number]
            within[split] = int((own[1:] == own[:-1]).sum())
            if number:
                leaks = _are_in(own, trained)
                across[split] = int(leaks.sum())
                if leaks.any() and first is None:
                    at = int(np.argmin(np.where(leaks, places[splits == number], np.iinfo(np.int64).max)))
                    same = places[(windows == own[at]) & (splits == 0)]
                    first = int(places[splits == number][at]) >> 2, int(same[0]) >> 2
        return Copies(ONE_IN * self._rate, counts, within, across, first)


def _distinct(words: np.ndarray) -> np.ndarray:
    """Of sorted words each once. (numpy's own `unique` hashes them, which takes ten times as long.)"""
    return words[np.concatenate((words[:1] == words[:1], words[1:] != words[:-1]))]


def _are_in(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] bool: which of the words are among others, which are sorted."""
    if not others.size:
        return np.zeros(words.size, bool)
    return others[np.minimum(np.searchsorted(others, words), others.size - 1)] == words
