"""Segments: sequences that stand one after the other in a row of tokens, and know nothing of each other.

They are given by their offsets, 0 < ... < L, with both ends: (0, 100, 250) are 100 and 150 tokens. Either each row of a
batch has offsets of its own, or one sequence of offsets holds for all of them. No convolution and no attention crosses
a border, and positions count from 0 in every segment.

Legend: B rows, L tokens of a row, G segments of a group.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

Offsets = Sequence[int] | Sequence[Sequence[int]]

LEAST_SIZE = 32
"""Shorter segments are computed as if they had so many tokens: more groups would cost more than the padding."""


class Group(NamedTuple):
    """Segments that are computed together, each padded on the right to `size` tokens: the next power of two, but not
    more than the longest segment has. Tokens are numbered over all rows, row * L + token."""

    size: int
    tokens: Tensor
    """int64 [G, size]: the token at each place; where there is padding, the segment's last one again."""
    padding: Tensor
    """bool [G, size]"""


class Segments:
    """The segments of a batch. What depends on a device is made once for each.

    Args:
        offsets: of each row, or the same for all.
        batch, length: B and L. On a context rank L still counts the tokens of all ranks.

    Raises:
        ValueError: other rows than the batch has, or offsets that do not begin with 0, grow, and end with L.
    """

    def __init__(self, offsets: Offsets, batch: int, length: int) -> None:
        self.rows = _rows(offsets, batch, length)
        self.batch, self.length = batch, length
        self._starts = np.array([row * length + start for row, edges in enumerate(self.rows) for start in edges[:-1]])
        self._sizes = np.array([size for edges in self.rows for size in np.diff(edges).tolist()])
        self.longest = int(self._sizes.max())
        self._on_device: dict[torch.device, tuple[Tensor, list[Group], Tensor]] = {}
        self._by_size: dict[torch.device, tuple[Tensor, list[int]]] = {}
        self._parts: dict[tuple[int, int], Segments] = {}

    def part(self, rows: slice) -> "Segments":
        """The segments of some of the rows."""
        key = rows.start, rows.stop
        if key == (0, self.batch):
            return self
        if key not in self._parts:
            self._parts[key] = Segments(self.rows[rows], rows.stop - rows.start, self.length)
        return self._parts[key]

    def positions(self, device: torch.device) -> Tensor:
        """int64 [B, L]: the place of every token in its segment."""
        return self._made(device)[0]

    def groups(self, device: torch.device) -> list[Group]:
        """All segments, in groups of like size; the smallest first."""
        return self._made(device)[1]

    def places(self, device: torch.device) -> Tensor:
        """int64 [B L]: where each token is among the places of all groups, one after the other."""
        return self._made(device)[2]

    def by_size(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """int32 [segments, 3], in the order of `groups`: each one's row, its first token there, and its tokens; and of
        each group, one after the other, its size, how many segments it has, and how many tokens they have."""
        if device not in self._by_size:
            rows, firsts = np.divmod(self._starts, self.length)
            found = np.stack([rows, firsts, self._sizes], axis=1).astype(np.int32)
            classes = self._classes()
            sizes = [int(n) for size in np.unique(classes)
                     for n in (size, (classes == size).sum(), self._sizes[classes == size].sum())]
            self._by_size[device] = _sent(found[np.argsort(classes, kind="stable")], device), sizes
        return self._by_size[device]

    def _classes(self) -> np.ndarray:
        """The size of the group of each segment."""
        powers = 1 << np.ceil(np.log2(np.maximum(self._sizes, LEAST_SIZE))).astype(np.int64)
        return np.minimum(powers, self.longest)

    def _made(self, device: torch.device) -> tuple[Tensor, list[Group], Tensor]:
        if device not in self._on_device:
            positions = np.arange(self.batch * self.length) - np.repeat(self._starts, self._sizes)
            classes = self._classes()
            groups, places, first = [], np.empty(positions.size, dtype=np.int64), 0
            for size in np.unique(classes).tolist():
                chosen, columns = classes == size, np.arange(size)
                sizes = self._sizes[chosen, None]
                tokens = self._starts[chosen, None] + np.minimum(columns, sizes - 1)
                padding = columns >= sizes
                places[tokens[~padding]] = first + np.flatnonzero(~padding)
                groups.append(Group(size, _sent(tokens, device), _sent(padding, device)))
                first += tokens.size
            self._on_device[device] = (_sent(positions.reshape(self.batch, self.length), device), groups,
                                       _sent(places, device))
        return self._on_device[device]


def segments_of(offsets: "Offsets | Segments | None", batch: int, length: int) -> Segments | None:
    """The segments that are meant; None where every row is one whole.

    Raises:
        ValueError: as `Segments`, or segments of another batch or length.
    """
    if offsets is None:
        return None
    found = offsets if isinstance(offsets, Segments) else Segments(offsets, batch, length)
    if (found.batch, found.length) != (batch, length):
        raise ValueError(f"the segments are of {found.batch} rows of {found.length} tokens, the input has {batch} of "
                         f"{length}")
    return None if all(len(edges) == 2 for edges in found.rows) else found


def _rows(offsets: Offsets, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    if all(isinstance(edge, int) for edge in offsets):
        rows = (tuple(cast("Sequence[int]", offsets)),) * batch
    else:
        rows = tuple(tuple(edges) for edges in cast("Sequence[Sequence[int]]", offsets))
    if len(rows) != batch:
        raise ValueError(f"segments are of {len(rows)} rows, the batch has {batch}: give the offsets of each row, or "
                         f"one sequence of offsets for all")
    for edges in rows:
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != length or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"segments of {length} tokens must be offsets that grow from 0 to {length}, got "
                             f"{list(edges)}")
    return rows


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """On a device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
