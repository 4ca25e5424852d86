"""The scale of numbers that belong to places: by it they are learnt, whatever their units."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from hyena_dist.data.errors import DataError

_SAMPLED = 1000
"""Training sequences, evenly spread, that a scale is measured on."""


@dataclass(frozen=True)
class Scale:
    """What is known of the training labels of each track."""

    count: np.ndarray
    """int64 [tracks], labels that were looked at; 0: no training sequence has a label of this track."""
    mean: np.ndarray
    """float64 [tracks]; 0 where there is no label."""
    deviation: np.ndarray
    """float64 [tracks]; 1 where all labels are the same, or there is none."""

    def notes(self) -> list[str]:
        """What is odd in it, a line each."""
        empty = np.flatnonzero(self.count == 0).tolist()
        first = ", ".join(map(str, empty[:10])) + ", ..." * (len(empty) > 10)
        return [f"{len(empty):,} of {len(self.count):,} tracks have no label in train, and nothing is learnt of them: "
                f"those of number {first}, counted from 0"] * bool(empty)


def scale_of(labels: Callable[[int], np.ndarray], sequences: int, tracks: int) -> Scale:
    """The scale of the labels of so many training sequences. It is measured on a sample of them, or on all where a
    track has no label in the sample.

    Args:
        labels: gives those of a sequence by its number, in an array whose values belong to one track after the other,
            NaN where there is none.

    Raises:
        DataError: there is no label at all, or as `labels` raises it.
    """
    step = -(-sequences // _SAMPLED)
    found = _measured(map(labels, range(0, sequences, step)), tracks)
    if step > 1 and not found.count.all():
        found = _measured(map(labels, range(sequences)), tracks)
    if not found.count.any():
        raise DataError("finetune.table has no label in train that is known: every number is NaN, or is cut off by "
                        "finetune.bins_cut or finetune.diagonals")
    return found


def _measured(arrays: Iterable[np.ndarray], tracks: int) -> Scale:
    """Array by array (Chan et al. 1983): those of all sequences would not fit into memory."""
    count = np.zeros(tracks, dtype=np.int64)
    mean, squares = np.zeros(tracks), np.zeros(tracks)
    for array in arrays:
        values = array.astype(np.float64).reshape(-1, tracks)
        known = ~np.isnan(values)
        more = known.sum(0)
        own = np.where(known, values, 0).sum(0) / more.clip(min=1)
        total, apart = count + more, np.where(more > 0, own - mean, 0)
        squares += np.square(np.where(known, values - own, 0)).sum(0) + apart**2 * count * more / total.clip(min=1)
        mean += apart * more / total.clip(min=1)
        count = total
    deviation = np.sqrt(squares / count.clip(min=1))
    # Labels have single precision: what differs by less is the same number.
    same = deviation <= np.maximum(np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
    return Scale(count, mean, np.where(same, 1.0, deviation))
