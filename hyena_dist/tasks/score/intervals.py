"""Intervals of means by a bootstrap over blocks: neighbouring bases are alike, so whole stretches are drawn."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_AT_ONCE = 2**17
"""Weights of blocks that are drawn, and multiplied, together."""


class Interval(NamedTuple):
    """The ends of an interval in which a number lies with a probability of LEVEL; nan where there is one block."""

    low: float
    high: float


class Blocks:
    """Resamples of n blocks, the same for everything that is asked of them, so that what is compared is paired. They
    take a kilobyte a block."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        random, even = np.random.default_rng(seed), np.full(count, 1 / count)
        self._step = max(1, _AT_ONCE // count)  # resamples
        # How often a block is in a resample, [RESAMPLES, n]: once in the mean, and a byte holds 255 times, which never
        # happens.
        self._weights = np.concatenate([
            random.multinomial(count, even, min(self._step, RESAMPLES - first)).astype(np.uint8)
            for first in range(0, RESAMPLES, self._step)])

    def sums(self, of_blocks: np.ndarray) -> np.ndarray:
        """float64 [n, m] -> [RESAMPLES, m], the sums over each resample."""
        return np.concatenate([self._weights[first : first + self._step].astype(np.float64) @ of_blocks
                               for first in range(0, RESAMPLES, self._step)])

    def interval(self, values: np.ndarray, holding: int | None = None) -> Interval:
        """Of a number that each resample has, [RESAMPLES].

        Args:
            holding: blocks that have something of what the number is of; None: all. What lies in one block is the same
                in every resample that has it, and its spread of nothing would say that it is known exactly.
        """
        known = values[np.isfinite(values)]
        if (self.count if holding is None else holding) < 2 or not known.size:
            return Interval(np.nan, np.nan)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(low), float(high))
