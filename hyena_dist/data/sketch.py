"""What of a sequence comes again elsewhere, on either strand: found by samples at places that its content chooses.

A place is chosen by the 8 bases there, one place in some 64; so two copies of a sequence are sampled at the same
places, wherever they begin. The 256 bases round a place make a window, which is found again where all of them are the
same; and at one place in four the 32 bases round it make a 32-mer, which near copies share too, since a changed base
costs only those few that it lies in.
"""

from typing import NamedTuple

import numpy as np

from hyena_dist.data.order import mix

WINDOW = 256
"""Bases of a window. A copy of 1,024 bases holds some 12 of them, and is missed once in 100,000 times."""
ONE_IN = 64
"""A window is taken at one place in so many."""
_BEFORE, _CORE, _LENGTH = 12, 8, 32
_WINDOW_BEFORE = (WINDOW - _CORE) // 2
_BATCH = 1 << 20
_CODE = np.full(256, 4, dtype=np.uint8)
_CODE[list(b"ACGTacgt")] = [0, 1, 2, 3] * 2
_SWAPS = tuple((np.uint64(bits), np.uint64(mask)) for bits, mask in (
    (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F), (8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF),
    (32, 0x00000000FFFFFFFF)))


def _levels() -> np.ndarray:
    """[65536] uint8 by the middle of 8 bases: 1 for windows, 2 for 32-mers too, the same on the other strand; 0 for
    those of fewer than three letters, which genomes repeat without end."""
    cores = np.arange(1 << 2 * _CORE)
    letters = cores[:, None] >> 2 * np.arange(_CORE) & 3  # the last base first
    other_strand = ((3 - letters) << 2 * np.arange(_CORE - 1, -1, -1)).sum(axis=1)
    kinds = sum((letters == letter).any(axis=1).astype(int) for letter in range(4))
    drawn = mix(np.minimum(cores, other_strand))
    levels = (drawn % np.uint64(ONE_IN) == 0).astype(np.uint8) + (drawn % np.uint64(4 * ONE_IN) == 0)
    return np.where(kinds > 2, levels, 0).astype(np.uint8)


_LEVELS = _levels()


class Found(NamedTuple):
    """The samples of a sequence."""

    words: np.ndarray
    """32-mers, uint64, of the strand whose number is the smaller; in no order."""
    windows: np.ndarray
    """Hashes of windows, uint64, of the same kind."""
    places: np.ndarray
    """First base of each window, int64."""


def _reversed(words: np.ndarray) -> np.ndarray:
    """The reverse complements of 32-mers."""
    words = ~words
    for bits, mask in _SWAPS:
        words = (words >> bits & mask) | ((words & mask) << bits)
    return words


def _words(fours: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """[n, length / 32] the 32-mers, uint64, that follow each other from these places on.

    Args:
        fours: uint8, at each place the 4 bases from there on at two bits each.
    """
    windows = np.lib.stride_tricks.sliding_window_view(fours, length - 3)[:, ::4]
    return np.ascontiguousarray(windows[starts]).view(">u8").astype(np.uint64)


def _known(starts: np.ndarray, length: int, size: int, unknown: np.ndarray) -> np.ndarray:
    """Of these places those from which on `length` bases lie inside `size` and hold none of the unknown, whose places
    are in order."""
    starts = starts[(starts >= 0) & (starts <= size - length)]
    if not unknown.size:
        return starts
    return starts[np.searchsorted(unknown, starts) == np.searchsorted(unknown, starts + length)]


def look(bases: np.ndarray) -> Found:
    """The samples of ASCII bases, uint8; of those that hold other codes than A, C, G and T none, nor the windows of
    short repeats, in which 32 bases are those before them."""
    found = []
    for first in range(0, bases.size, _BATCH):  # of places whose 8 bases begin in this batch
        begin = max(first - _WINDOW_BEFORE, 0)
        codes = _CODE[bases[begin : first + _BATCH + WINDOW]]
        if codes.size < WINDOW:
            codes = np.concatenate((codes, np.full(WINDOW - codes.size, 4, np.uint8)))
        unknown = np.flatnonzero(codes == 4)
        codes &= 3
        twos = codes[:-1] << 2 | codes[1:]
        fours = twos[:-2] << 4 | twos[2:]
        halves = fours[first - begin : -4][:_BATCH], fours[first - begin + 4 :][:_BATCH]
        levels = _LEVELS[halves[0].astype(np.uint16) << 8 | halves[1]]
        chosen = np.flatnonzero(levels)
        middles = chosen[levels[chosen] == 2]
        words = _words(fours, _known(middles + (first - begin - _BEFORE), _LENGTH, codes.size, unknown), _LENGTH)
        starts = _known(chosen + (first - begin - _WINDOW_BEFORE), WINDOW, codes.size, unknown)
        parts = _words(fours, starts, WINDOW)
        varied = parts[:, 0] != parts[:, 1]
        parts, starts = parts[varied], starts[varied]
        forward, reverse = mix(*parts.T), mix(*_reversed(parts)[:, ::-1].T)
        found.append((np.minimum(words, _reversed(words))[:, 0], np.minimum(forward, reverse)[: len(parts)],
                      starts.astype(np.int64) + begin))
    if not found:
        return Found(*(np.zeros(0, kind) for kind in (np.uint64, np.uint64, np.int64)))
    return Found(*(np.concatenate(column) for column in zip(*found, strict=True)))
