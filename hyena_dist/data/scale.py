"""The scale of numbers that belong to places: by it they are learnt, whatever their units."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from hyena_dist.data.errors import DataError

_SAMPLED = 1000
"""Training sequences, evenly spread, that a scale is measured on."""


class Scale(NamedTuple):
    """What is known of the training labels of each track."""

    mean: list[float]
    """0 where there is no label."""
    deviation: list[float]
    """1 where all labels are the same, or there is none."""


def scale_of(labels: Callable[[int], np.ndarray], sequences: int, tracks: int) -> tuple[Scale, list[str]]:
    """The scale of the labels of so many training sequences, and what is odd in it, a line each. It is measured on a
    sample of the sequences, or on all where a track has no label in the sample.

    Args:
        labels: gives those of a sequence by its number, [..., tracks] or, of one track, of any shape, NaN where there
            is none.

    Raises:
        DataError: there is no label at all, or as `labels` raises it.
    """
    step = -(-sequences // _SAMPLED)
    count, mean, squares = _moments(map(labels, range(0, sequences, step)), tracks)
    if step > 1 and not count.all():
        count, mean, squares = _moments(map(labels, range(sequences)), tracks)
    if not count.any():
        raise DataError("finetune.table has no label in train that is known: every number is NaN, or is cut off by "
                        "finetune.bins_cut or finetune.diagonals")
    deviation = np.sqrt(squares / count.clip(min=1))
    # Labels have single precision: what differs by less is the same number.
    same = deviation <= np.maximum(np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
    return Scale(mean.tolist(), np.where(same, 1.0, deviation).tolist()), _notes(np.flatnonzero(count == 0), tracks)


def _notes(empty: np.ndarray, tracks: int) -> list[str]:
    numbers = ", ".join(map(str, empty[:10].tolist())) + ", ..." * (len(empty) > 10)
    return [f"{len(empty):,} of {tracks:,} tracks have no label in train, and nothing is learnt of them: those of "
            f"number {numbers}, counted from 0"] * bool(len(empty))


def _moments(arrays: Iterable[np.ndarray], tracks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each track how many labels there are, their mean, and the sum of their squared deviations. Array by array
    (Chan et al. 1983): those of all sequences would not fit into memory."""
    count, mean, squares = np.zeros(tracks, dtype=np.int64), np.zeros(tracks), np.zeros(tracks)
    for array in arrays:
        values = array.astype(np.float64).reshape(-1, tracks)
        known = ~np.isnan(values)
        more = known.sum(0)
        own = np.where(known, values, 0).sum(0) / more.clip(min=1)
        total, apart = count + more, np.where(more > 0, own - mean, 0)
        squares += np.square(np.where(known, values - own, 0)).sum(0) + apart**2 * count * more / total.clip(min=1)
        mean += apart * more / total.clip(min=1)
        count = total
    return count, mean, squares
