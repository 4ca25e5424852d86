"""How much of the held-out bases also trains, near copies too: 32-mers, sampled by what is in them.

A 32-mer is sampled where its middle 8 bases are of a fixed choice, one place in some 256; so two copies of a sequence
give the same samples, wherever they begin, and a changed base costs those few that it lies in. Both strands are one.
"""

from typing import NamedTuple

import numpy as np

from hyena_dist.data.order import mix

_BEFORE, _CORE, _LENGTH = 12, 8, 32
_ONE_IN = 256
_BATCH = 1 << 20
_CODE = np.full(256, 4, dtype=np.uint8)
_CODE[list(b"ACGTacgt")] = [0, 1, 2, 3] * 2
_GAP = np.frombuffer(b"N", dtype=np.uint8)
_SHIFTS = 2 * np.arange(_LENGTH - 1, -1, -1, dtype=np.uint64)


def _chosen() -> np.ndarray:
    """[65536] bool: the middles that are sampled, with those of the other strand; none of fewer than three letters,
    which genomes repeat without end."""
    cores = np.arange(1 << 2 * _CORE)
    letters = cores[:, None] >> 2 * np.arange(_CORE) & 3  # the last base first
    other_strand = ((3 - letters) << 2 * np.arange(_CORE - 1, -1, -1)).sum(axis=1)
    kinds = sum((letters == letter).any(axis=1).astype(int) for letter in range(4))
    return (mix(np.minimum(cores, other_strand)) % np.uint64(_ONE_IN) == 0) & (kinds > 2)


_CHOSEN = _chosen()


def samples(bases: np.ndarray) -> np.ndarray:
    """The sampled 32-mers of ASCII bases, uint64; of those that hold other codes than A, C, G and T none."""
    codes = _CODE[bases]
    words = (codes & 3).astype(np.uint16)
    for size in (1, 2, 4):  # of 1 base, 2, 4 and then 8
        words = words[:-size] << np.uint16(2 * size) | words[size:]
    starts = np.flatnonzero(_CHOSEN[words]) - _BEFORE
    starts = starts[(starts >= 0) & (starts <= bases.size - _LENGTH)]
    letters = codes[starts[:, None] + np.arange(_LENGTH)]
    letters = letters[(letters < 4).all(axis=1)].astype(np.uint64)
    forward = (letters << _SHIFTS).sum(axis=1, dtype=np.uint64)
    reverse = ((np.uint64(3) - letters[:, ::-1]) << _SHIFTS).sum(axis=1, dtype=np.uint64)
    return np.minimum(forward, reverse)


class Shared(NamedTuple):
    """Sampled 32-mers that are held out, and how many of them train too."""

    held_out: int
    trained: int


class Sketch:
    """Samples of what trains and of what is held out."""

    def __init__(self) -> None:
        self._pieces: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._sizes = {False: 0, True: 0}
        self._found: dict[bool, list[np.ndarray]] = {False: [], True: []}

    def add(self, bases: np.ndarray, *, held_out: bool) -> None:
        """Take a stretch of ASCII bases; many short ones are looked at together."""
        for start in range(0, bases.size, _BATCH):
            piece = bases[start : start + _BATCH + _LENGTH - 1]
            self._pieces[held_out] += [piece.copy(), _GAP]
            self._sizes[held_out] += piece.size
            if self._sizes[held_out] >= _BATCH:
                self._look(held_out)

    def _look(self, held_out: bool) -> None:
        if self._sizes[held_out] >= _LENGTH:
            self._found[held_out].append(np.unique(samples(np.concatenate(self._pieces[held_out]))))
        self._pieces[held_out], self._sizes[held_out] = [], 0

    def shared(self) -> Shared:
        """Of all that was taken."""
        for held_out in (False, True):
            self._look(held_out)
        trained, held = (np.concatenate([*self._found[key], np.zeros(0, np.uint64)]) for key in (False, True))
        return Shared(held.size, int(np.isin(held, trained).sum()))
