"""Markov chains on bases: what a model must beat, scored on exactly the bases that validation scores.

A chain of order k gives a base the probability (count + 1) / (context count + 4), counted over the training bases. Its
context is the k bases before; where fewer are known, because the interval begins or a base that is not A, C, G or T
stands between, the chain of the longest known context scores. Contexts never cross an interval's border.

Beside a model of k-mers the chains score the bases that its validation scores, which are fewer: not the first k of an
interval, and none of a k-mer that is not scored (`data.tokenizer.Tokenizer.scored`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hyena_dist.data.manifest import Interval
from hyena_dist.data.pool import Pool
from hyena_dist.data.tokenizer import NUCLEOTIDES, SOFT, A, T, Tokenizer

MAX_ORDER = 6
_CHUNK = 1 << 22


class _Chunk(NamedTuple):
    """Bases of an interval in a row."""

    number: int
    """Of the interval, over all pools."""
    interval: Interval
    start: int
    """Of the chunk in the interval, without its context: a multiple of k."""
    ids: np.ndarray
    """uint8, the token ids of the context and of the chunk; those of soft-masked bases have SOFT."""
    context: int
    """How many at the front are context only: none at a border of the interval, else at least k."""


def _chunks(pools: Sequence[Pool], split: str, max_order: int, k: int = 1) -> Iterator[_Chunk]:
    size = _CHUNK // k * k
    intervals = [(pool, interval) for pool in pools for interval in pool.intervals(split)]
    for number, (pool, interval) in enumerate(intervals):
        for start in range(0, interval.bases, size):
            context = min(max(max_order, k), start)
            ids = np.empty(min(start + size, interval.bases) - start + context, dtype=np.uint8)
            pool.manifest.fill(ids, interval.first_base + start - context, soft=True)
            yield _Chunk(number, interval, start, ids, context)


def words(ids: np.ndarray, context: int, max_order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each order k: the word (k bases and the base itself, as a number) that ends at each position, and which of
    these words are whole: inside the interval and all A, C, G, T."""
    base = ids.astype(np.int64) - A
    known = (ids >= A) & (ids <= T)
    word, whole = base.copy(), known.copy()
    yield word[context:], whole[context:]
    for order in range(1, max_order + 1):
        word[order:] += base[:-order] << 2 * order
        whole[order:] &= known[:-order]
        whole[:order] = False
        yield word[context:], whole[context:]


def fit(pools: Sequence[Pool], max_order: int = MAX_ORDER) -> list[np.ndarray]:
    """Log-probabilities [4 ** (k + 1)] of each word's last base given those before it, for k = 0 ... max_order, over
    the training bases of every pool."""
    counts = [np.zeros(4 ** (order + 1), dtype=np.int64) for order in range(max_order + 1)]
    for chunk in _chunks(pools, "train", max_order):
        of_chunk = words(chunk.ids & ~np.uint8(SOFT), chunk.context, max_order)
        for count, (word, whole) in zip(counts, of_chunk, strict=True):
            count += np.bincount(word[whole], minlength=count.size)
    tables = [count.reshape(-1, 4) + 1.0 for count in counts]
    return [np.log(table / table.sum(axis=1, keepdims=True)).ravel() for table in tables]


def _scored(known: np.ndarray, context: int, tokenizer: Tokenizer) -> np.ndarray:
    """Which bases of a chunk, from `context` on, a validation scores: bool. The chunk begins with its interval where
    there is no context, and else, at the context's end, with a k-mer of those that do not overlap.

    Args:
        known: bool, which bases are A, C, G or T, the context's first.
    """
    k, scored = tokenizer.k, known[context:].copy()
    if k > 1 and not tokenizer.overlap:
        whole = scored.size // k * k
        scored[:whole] = scored[:whole].reshape(-1, k).all(axis=1).repeat(k)
        scored[whole:] = False
    elif k > 1:  # the k-mer that ends here and the one before it: k + 1 known bases in a row
        unknown = np.concatenate(([0], np.cumsum(~known)))
        ends = np.arange(context + 1, known.size + 1)
        scored = unknown[ends] == unknown[np.maximum(ends - k - 1, 0)]
    if not context:
        scored[:k] = False
    return scored


Label = Callable[[int, Interval, int, np.ndarray], np.ndarray]
"""The labels of bases in a row, from 0 on. Takes the number of their interval over all pools, the interval, the first
base's place in it, and bool [n], which are soft-masked. Returns int64 [n]."""


def score(tables: Sequence[np.ndarray], pools: Sequence[Pool], split: str, *, labels: int = 1,
          label: Label = lambda *_: np.zeros(1, dtype=np.int64), tokenizer: Tokenizer = NUCLEOTIDES) -> np.ndarray:
    """The losses of the chains of order 0 upwards on the bases of a split that a validation with this tokenizer
    scores: of single bases every A, C, G and T but an interval's first.

    Args:
        tables: by `fit`.
        labels: how many kinds of bases are told apart.

    Returns:
        float64 [orders, 2, labels]: the sum of the losses in nats, and the number of scored bases, of each label.
    """
    found = np.zeros((len(tables), 2, labels))
    for number, interval, start, ids, context in _chunks(pools, split, len(tables) - 1, tokenizer.k):
        soft, ids = ids[context:] >= SOFT, ids & ~np.uint8(SOFT)
        scored = _scored((ids >= A) & (ids <= T), context, tokenizer)
        of_bases = np.broadcast_to(label(number, interval, start, soft), scored.shape)[scored]
        best = np.zeros(scored.size)
        for order, (word, whole) in enumerate(words(ids, context, len(tables) - 1)):
            best[whole] = tables[order][word[whole]]
            found[order, 0] -= np.bincount(of_bases, best[scored], minlength=labels)
        found[:, 1] += np.bincount(of_bases, minlength=labels)
    return found
