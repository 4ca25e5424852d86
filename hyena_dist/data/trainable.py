"""Which stretches of a pool there is something to train on in."""

import logging

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Interval, Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.tokenizer import A, T, Tokenizer

_LOOK_BASES = 1 << 16

logger = logging.getLogger(__name__)


def training_intervals(pool: Pool, lower_case_weight: float, tokenizer: Tokenizer) -> list[Interval]:
    """The stretches of a pool that training draws its windows from; those too short for a window have none.

    Raises:
        DataError: there is nothing to train on.
    """
    intervals, k, least = pool.intervals("train"), tokenizer.k, tokenizer.bases(2)
    if not any(interval.bases >= least for interval in intervals):
        longer = "" if k == 1 else f", and stretches of at least {least} bases, two tokens of model.kmer={k}"
        raise DataError(f"{pool.where} has no training window; build shards with bases of split train{longer}")
    if not _has_a_scored_base(pool.manifest, tokenizer, intervals):
        shorter = "" if k == 1 else f", or set model.kmer to less than {k}"
        raise DataError(f"{pool.where} has no training base to score: " + ("all are" if k == 1 else f"no {k} bases in "
                        "a row are without") + " N or other codes than A, C, G and T; build shards of sequence that is "
                        f"known{shorter}")
    if not lower_case_weight and not _has_a_scored_base(pool.manifest, tokenizer, intervals, upper_only=True):
        raise DataError(f"{pool.where} has no training base to score: all that are known are soft-masked, and "
                        f"data.lower_case_weight is 0; give them a weight, as data.lower_case_weight=1")
    if short := [interval.contig for interval in intervals if interval.bases < least]:
        what = "of a single base have no next base" if k == 1 else f"of less than {least} bases have no next token"
        logger.info("%s: %d stretches %s and are skipped, the first on %s", pool.where, len(short), what, short[0])
    return intervals


def _has_a_scored_base(manifest: Manifest, tokenizer: Tokenizer, intervals: list[Interval], *,
                       upper_only: bool = False) -> bool:
    """Whether any k bases in a row behind the first of an interval are A, C, G or T, and the last of upper case if that
    is asked; where the shards are damaged too, which the read of that window will tell."""
    every = Tokenizer(tokenizer.k, overlap=tokenizer.k > 1)  # k-mers of all frames
    last = T if every.k == 1 else every.soft - 1
    try:
        for interval in intervals:
            for start in range(interval.start + 1, interval.end, _LOOK_BASES):
                stop = min(start + _LOOK_BASES + every.k - 1, interval.end)
                bases = np.empty(stop - start, dtype=np.uint8)
                manifest.fill(bases, interval.first_base + start - interval.start, soft=upper_only)
                ids = every.of_bases(bases)
                if ((ids >= A) & (ids <= last)).any():
                    return True
    except DataError:
        return True
    return False
