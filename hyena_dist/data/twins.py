"""Sequences that come under several names, of either strand, and what of them is held out and also trains."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hyena_dist.data.splits import Stretch


class _Twin(NamedTuple):
    """A contig of a sequence."""

    name: str
    bases: int
    stretches: Sequence[Stretch]
    reverse: bool
    """Of the two strands, whether the reverse complement is the one that all of the sequence are compared on."""

    def spans(self, *, train: bool) -> np.ndarray:
        """[n, 2] first base and end, on that strand, of the stretches that train or of those that are held out."""
        rows = np.array([row[:2] for row in self.stretches if (row.split == "train") == train], np.int64).reshape(-1, 2)
        return self.bases - rows[:, ::-1] if self.reverse else rows


class Leak(NamedTuple):
    """Held-out bases that also train under another name."""

    bases: int
    """Each counted once, however many copies of it train."""
    one: str
    other: str
    """Two contigs of which this is true, in their order; "" where there are none."""


class Twins:
    """The contigs of a build by their sequence, with the stretches of each."""

    def __init__(self) -> None:
        self._found: dict[bytes, list[_Twin]] = {}

    def add(self, name: str, bases: int, strands: tuple[bytes, bytes], stretches: Sequence[Stretch]) -> str | None:
        """Take a contig; the name of the first with the same sequence, None where it is the first.

        Args:
            strands: digests of the sequence and of its reverse complement, as `measure.strands` makes them.
        """
        forward, reverse = strands
        twins = self._found.setdefault(min(forward, reverse), [])
        twins.append(_Twin(name, bases, stretches, reverse=reverse < forward))
        return twins[0].name if len(twins) > 1 else None

    def leak(self) -> Leak:
        """What of all that was taken is held out and also trains."""
        total, pair = 0, ["", ""]
        for twins in self._found.values():
            trained = _union(twin.spans(train=True) for twin in twins) if len(twins) > 1 else np.empty((0, 2), np.int64)
            for held in twins if trained.size else ():
                spans = held.spans(train=False)
                bases = _shared(spans, trained)
                if bases and not total:
                    other = next(twin for twin in twins if _shared(spans, _union([twin.spans(train=True)])))
                    pair = [twin.name for twin in twins if twin is held or twin is other]
                total += bases
        return Leak(total, *pair)


def _union(spans: Iterable[np.ndarray]) -> np.ndarray:
    """[n, 2] spans in order and without overlap that cover the same bases."""
    rows = np.concatenate([*spans])
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    reached = np.maximum.accumulate(rows[:, 1])
    first = np.flatnonzero(np.concatenate([[True], rows[1:, 0] > reached[:-1]])[: len(rows)])
    last = np.concatenate([first[1:], [len(rows)]])[: len(first)] - 1
    return np.stack([rows[first, 0], reached[last]], axis=1)


def _shared(spans: np.ndarray, union: np.ndarray) -> int:
    """Bases of these spans, which do not overlap each other, that the spans of a union cover."""
    if not len(union):
        return 0
    starts, lengths = union[:, 0], union[:, 1] - union[:, 0]
    before = np.cumsum(lengths) - lengths
    place = np.searchsorted(starts, spans, side="right") - 1
    covered = np.where(place < 0, 0, before[place] + np.minimum(spans - starts[place], lengths[place]))
    return int((covered[:, 1] - covered[:, 0]).sum())
