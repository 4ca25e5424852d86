"""What is held out and also trains, by samples of all that a build reads."""

from typing import NamedTuple

import numpy as np

from hyena_dist.data.sketch import ONE_IN, WINDOW
from hyena_dist.data.splits import SPLITS

MOST_WINDOWS = 1 << 25
"""Held at a time, 16 bytes each; beyond it every second is let go, and so on."""


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
    """Samples of what trains and of what is held out."""

    def __init__(self) -> None:
        self._words: dict[bool, list[np.ndarray]] = {False: [np.zeros(0, np.uint64)], True: [np.zeros(0, np.uint64)]}
        self._windows, self._places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        self._size, self._rate = 0, 1

    def add(self, train_words: np.ndarray, held_words: np.ndarray, windows: np.ndarray, places: np.ndarray) -> None:
        """Take samples.

        Args:
            windows: hashes, uint64 [n].
            places: of each its first base in the concatenation of all contigs, times 4, and the number of its split.
        """
        self._words[False].append(train_words)
        self._words[True].append(held_words)
        self._take(windows, places)
        while self._size > MOST_WINDOWS:
            self._rate *= 2
            all_windows, all_places = self._all()
            self._windows, self._places, self._size = [], [], 0
            self._take(all_windows, all_places)

    def _take(self, windows: np.ndarray, places: np.ndarray) -> None:
        if self._rate > 1:
            kept = windows % np.uint64(self._rate) == 0
            windows, places = windows[kept], places[kept]
        self._windows.append(windows)
        self._places.append(places)
        self._size += windows.size

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self._windows), np.concatenate(self._places)

    def shared(self) -> Shared:
        """Of the 32-mers of all that was taken."""
        trained, held = (np.unique(np.concatenate(self._words[key])) for key in (False, True))
        return Shared(held.size, int(np.isin(held, trained, assume_unique=True).sum()))

    def copies(self) -> Copies:
        """Of the windows of all that was taken."""
        windows, places = self._all()
        order = np.lexsort((places, windows))
        windows, places = windows[order], places[order]
        splits = places & 3
        counts = {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)}
        within, across, first = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS[1:], 0), None
        trained = np.unique(windows[splits == 0])
        for number, split in enumerate(SPLITS):
            own = windows[splits == number]
            within[split] = int((own[1:] == own[:-1]).sum())
            if number:
                leaks = np.isin(own, trained)
                across[split] = int(leaks.sum())
                if leaks.any() and first is None:
                    at = int(np.argmin(np.where(leaks, places[splits == number], np.iinfo(np.int64).max)))
                    same = places[(windows == own[at]) & (splits == 0)]
                    first = int(places[splits == number][at]) >> 2, int(same[0]) >> 2
        return Copies(ONE_IN * self._rate, counts, within, across, first)


__all__ = ["WINDOW", "Copies", "Samples", "Shared"]
