"""Packing: several stretches that are too short to fill a window share one, one after the other.

A window of length L holds L + 1 bases, as any other: inputs are the first L, targets the last L. Where a stretch ends
inside, its last base has no target, and the next stretch begins a new segment, of which no convolution and no attention
sees anything else (`ops.segments`). What is left of the window is padding, a segment of its own.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """Which window each stretch goes to, the windows numbered in the order in which they are begun: in the order of the
    stretches, each to the window with the least room that is enough for it, or else to a new one. So no two windows
    are half empty, and a few percent of all is left as padding.

    Args:
        sizes: of the stretches, each at most the capacity.
    """
    windows_with: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a window has room for r
    chosen, count = [], 0
    for size in sizes:
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            windows = windows_with[room]
            window = windows.pop()
            if not windows:
                rooms ^= 1 << room
        else:
            window, room, count = count, capacity, count + 1
        if left := room - size:
            windows_with.setdefault(left, []).append(window)
            rooms |= 1 << left
        chosen.append(window)
    return chosen


def packed(sizes: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches as windows: those that fill a window are one each, in their order, and then come windows of several.

    Args:
        sizes: of the stretches, each at most the capacity.
        order: their numbers, in the order in which they are packed.

    Returns:
        The numbers of the stretches window by window, and [windows + 1], where in those each window begins.
    """
    short = order[sizes[order] < capacity]
    window_of = np.array(best_fit(sizes[short].tolist(), capacity), dtype=np.int64)
    full = np.flatnonzero(sizes == capacity)
    counts = np.concatenate((np.ones(full.size, dtype=np.int64), np.bincount(window_of)))
    members = np.concatenate((full, short[np.argsort(window_of, kind="stable")]))
    return members, np.concatenate(([0], np.cumsum(counts)))


def packed_by_kind(sizes: Sequence[int], kinds: Sequence[str], capacity: int) -> list[list[int]]:
    """The numbers of the stretches window by window, where only those of one kind share a window."""
    windows = []
    for kind in dict.fromkeys(kinds):
        own = np.flatnonzero(np.array(kinds) == kind)
        members, first = packed(np.array(sizes)[own], np.arange(own.size), capacity)
        windows += [own[members[start:stop]].tolist() for start, stop in pairwise(first.tolist())]
    return windows


def edges(sizes: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The offsets of the segments (`ops.segments`) of a window that begins with stretches of these sizes.

    Args:
        tokens: of the window, over all context ranks.
    """
    ends = np.cumsum(sizes).tolist()
    return (0, *(end for end in ends if end < tokens), tokens)


def across(segments: Sequence[Sequence[int]], first: int, tokens: int) -> np.ndarray:
    """bool [B, l]: which of the l tokens from `first` on are the last of their segment in the window, so that the token
    after them is not their target."""
    found = np.zeros((len(segments), tokens), dtype=bool)
    for row, offsets in zip(found, segments, strict=True):
        last = np.array(offsets[1:-1], dtype=np.int64) - 1 - first
        row[last[(last >= 0) & (last < tokens)]] = True
    return found
