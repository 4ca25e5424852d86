"""Intervals of means by a bootstrap over blocks: neighbouring bases are alike, so whole stretches are drawn."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """The ends of an interval in which a number lies with a probability of LEVEL; nan where there is one block."""

    low: float
    high: float


class Blocks:
    """Resamples of n blocks, the same for everything that is asked of them, so that what is compared is paired."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        self._weights = draws.astype(np.float64)  # [RESAMPLES, n]

    def sums(self, of_blocks: np.ndarray) -> np.ndarray:
        """float64 [n, m] -> [RESAMPLES, m], the sums over each resample."""
        return self._weights @ of_blocks

    def interval(self, values: np.ndarray) -> Interval:
        """Of a number that each resample has, [RESAMPLES]."""
        known = values[np.isfinite(values)]
        if self.count < 2 or not known.size:
            return Interval(np.nan, np.nan)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(low), float(high))
