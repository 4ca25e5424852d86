"""Rows of token ids from pieces of shards: what of them is scored, and where one piece ends and the next begins."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hyena_dist.data.manifest import Manifest
from hyena_dist.data.packing import across, edges
from hyena_dist.data.tokenizer import COMPLEMENT, NUCLEOTIDES, SOFT, Tokenizer

_LOOK_BASES = 1 << 16


class Part(NamedTuple):
    """The tokens [first, first + tokens) of every window, which are what a context rank reads of it, and the token
    after them, which is the last one's target. What lies past the window is padding."""

    first: int
    tokens: int
    all_tokens: int | None = None
    """How many the padded window has over all context ranks; None: these are the last."""

    @property
    def whole(self) -> int:
        return self.first + self.tokens if self.all_tokens is None else self.all_tokens


def _read_row(manifest: Manifest, tokenizer: Tokenizer, row: np.ndarray, first: int, first_base: int, bases: int, *,
              reverse: bool, soft: bool) -> None:
    """Fill a row, which is all padding, with the tokens from number `first` on of the window of `bases` bases from
    `first_base` on; of their reverse complement, if that is asked."""
    if tokenizer.k > 1:
        tokens = tokenizer.tokens(bases)
        count = min(row.size, tokens - first)
        if count > 0:
            read = np.empty(tokenizer.bases(count), dtype=np.uint8)
            _read_row(manifest, NUCLEOTIDES, read, first * tokenizer.stride, first_base, tokenizer.bases(tokens),
                      reverse=reverse, soft=soft)
            row[:count] = tokenizer.of_bases(read)
        return
    count = min(row.size, bases - first)
    if count <= 0:
        return
    row = row[:count]
    manifest.fill(row, first_base + (bases - first - count if reverse else first), soft=soft)
    if reverse and soft:
        row[:] = (COMPLEMENT[row & ~np.uint8(SOFT)] | row & SOFT)[::-1]
    elif reverse:
        row[:] = COMPLEMENT[row[::-1]]


def read_pieces(tokenizer: Tokenizer, row: np.ndarray, part: Part, pieces: Iterable[tuple[Manifest, int, int, int]], *,
                reverse: bool, soft: bool) -> list[int]:
    """Fill a row, which is all padding, with this part of a window of pieces: the shards of each, the first base of the
    stretch that it is of, and from which base of that to which. Returns how many tokens each piece has."""
    sizes: list[int] = []
    for manifest, first_base, start, end in pieces:
        if (begin := sum(sizes) - part.first) < row.size:
            _read_row(manifest, tokenizer, row[max(begin, 0) :], max(-begin, 0), first_base + start, end - start,
                      reverse=reverse, soft=soft)
        sizes.append(tokenizer.tokens(end - start))
    return sizes


def content(tokenizer: Tokenizer, ids: np.ndarray, numbers: Sequence[int], sizes: list[list[int]], part: Part, *,
            soft: bool, weight: float, pack: bool) -> tuple[Any, ...]:
    """The fields of a `stream.Batch` as arrays, which reader processes can send: from ids, with the marks of
    soft-masked bases if `soft`, and how many tokens each piece of each row has."""
    masked = _without_soft(tokenizer, ids) if soft else None
    segments = [edges(row, part.whole) for row in sizes] if pack else None
    beyond = None if segments is None else across(segments, part.first, part.tokens)
    scored = _scored(tokenizer, ids, masked, weight, beyond)
    return ids, np.array(numbers, dtype=np.int64), scored, masked, segments, beyond


def _scored(tokenizer: Tokenizer, ids: np.ndarray, soft: np.ndarray | None, weight: float,
            beyond: np.ndarray | None) -> float:
    """How many bases the scored targets of rows tell; of those that are soft-masked each counts as much as its weight.
    What is beyond the piece of its input does not count. Some at a time, because large temporaries take new pages."""
    rows, width = ids.shape
    step = max(1, _LOOK_BASES // rows)
    count = masked = 0
    for first in range(1, width, step):
        scored = tokenizer.scored(ids[:, first - 1 : first + step])
        if beyond is not None:
            scored &= ~beyond[:, first - 1 : first - 1 + step]
        count += int(np.count_nonzero(scored))
        if soft is not None:
            masked += int(np.count_nonzero(scored & soft[:, first - 1 : first - 1 + step]))
    return tokenizer.stride * (count - masked + weight * masked if masked else count)


def _without_soft(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Take the marks of soft-masked tokens off the ids of rows. Returns bool [B, l], which targets had it."""
    soft = ids[:, 1:] >= tokenizer.soft
    ids &= ids.dtype.type(tokenizer.soft - 1)
    return soft
