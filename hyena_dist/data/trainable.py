"""Which stretches of a pool there is something to train on in."""

import logging

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Interval, Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.tokenizer import A, T

_LOOK_BASES = 1 << 16

logger = logging.getLogger(__name__)


def training_intervals(pool: Pool, lower_case_weight: float) -> list[Interval]:
    """The stretches of a pool that training draws its windows from.

    Raises:
        DataError: there is nothing to train on.
    """
    intervals = pool.intervals("train")
    if not any(interval.bases > 1 for interval in intervals):
        raise DataError(f"{pool.where} has no training window; build shards with bases of split train")
    if not _has_a_scored_base(pool.manifest, intervals):
        raise DataError(f"{pool.where} has no training base to score: all are N or other codes than A, C, G and T; "
                        f"build shards of sequence that is known")
    if not lower_case_weight and not _has_a_scored_base(pool.manifest, intervals, upper_only=True):
        raise DataError(f"{pool.where} has no training base to score: all that are known are soft-masked, and "
                        f"data.lower_case_weight is 0; give them a weight, as data.lower_case_weight=1")
    if short := [interval.contig for interval in intervals if interval.bases < 2]:
        logger.info("%s: %d stretches of a single base have no next base and are skipped, the first on %s", pool.where,
                    len(short), short[0])
    return intervals


def _has_a_scored_base(manifest: Manifest, intervals: list[Interval], *, upper_only: bool = False) -> bool:
    """Whether any base but the first of an interval is A, C, G or T, and of upper case if that is asked; where the
    shards are damaged too, which the read of that window will tell."""
    try:
        for interval in intervals:
            for start in range(interval.start + 1, interval.end, _LOOK_BASES):
                ids = np.empty(min(start + _LOOK_BASES, interval.end) - start, dtype=np.uint8)
                manifest.fill(ids, interval.first_base + start - interval.start, soft=upper_only)
                if ((ids >= A) & (ids <= T)).any():
                    return True
    except DataError:
        return True
    return False
