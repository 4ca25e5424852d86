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


def _packed(letters: np.ndarray) -> np.ndarray:
    """[n, 32 m] codes of bases as [n, m] words of two bits a base, uint64."""
    for bits, size in ((2, 1), (4, 1), (8, 2), (16, 4), (32, 8)):  # of a word's half, and bytes of the word
        words = letters.astype(f"u{size}")
        letters = words[:, 0::2] << words.dtype.type(bits) | words[:, 1::2]
    return letters


def _reversed(words: np.ndarray) -> np.ndarray:
    """The reverse complements of 32-mers."""
    words = ~words
    for bits, mask in _SWAPS:
        words = (words >> bits & mask) | ((words & mask) << bits)
    return words


def _letters(codes: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, length] codes from these places on, those in which all are A, C, G or T; and their places."""
    starts = starts[(starts >= 0) & (starts <= codes.size - length)]
    letters = np.lib.stride_tricks.sliding_window_view(codes, length)[starts] if starts.size else \
        np.empty((0, length), np.uint8)
    kept = letters.max(axis=1, initial=0) < 4
    return letters[kept], starts[kept]


def look(bases: np.ndarray) -> Found:
    """The samples of ASCII bases, uint8; of those that hold other codes than A, C, G and T none, nor the windows of
    short repeats, in which 32 bases are those before them."""
    found = []
    for first in range(0, bases.size, _BATCH):  # of places whose 8 bases begin in this batch
        begin = max(first - _WINDOW_BEFORE, 0)
        codes = _CODE[bases[begin : first + _BATCH + WINDOW]]
        cores = (codes[first - begin : first - begin + _BATCH + _CORE - 1] & 3).astype(np.uint16)
        for size in (1, 2, 4):  # of 1 base, 2, 4 and then 8
            cores = cores[:-size] << np.uint16(2 * size) | cores[size:]
        levels = _LEVELS[cores]
        chosen = np.flatnonzero(levels)
        words = _packed(_letters(codes, chosen[levels[chosen] == 2] + (first - begin - _BEFORE), _LENGTH)[0])
        letters, starts = _letters(codes, chosen + (first - begin - _WINDOW_BEFORE), WINDOW)
        parts = _packed(letters)
        varied = parts[:, 0] != parts[:, 1]
        parts, starts = parts[varied], starts[varied]
        forward, reverse = mix(*parts.T), mix(*_reversed(parts)[:, ::-1].T)
        found.append((np.minimum(words, _reversed(words))[:, 0], np.minimum(forward, reverse)[: len(parts)],
                      starts.astype(np.int64) + begin))
    if not found:
        return Found(*(np.zeros(0, kind) for kind in (np.uint64, np.uint64, np.int64)))
    return Found(*(np.concatenate(column) for column in zip(*found, strict=True)))
