"""Markov chains on bases: what a model must beat, scored on exactly the bases that validation scores.

A chain of order k gives a base the probability (count + 1) / (context count + 4), counted over the training bases. Its
context is the k bases before; where fewer are known, because the interval begins or a base that is not A, C, G or T
stands between, the chain of the longest known context scores. Contexts never cross an interval's border.
"""

from collections.abc import Iterator
from math import exp

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.tokenizer import A, T

MAX_ORDER = 6
_CHUNK = 1 << 22


def _chunks(manifest: Manifest, split: str, max_order: int) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids of a split in chunks, and how many at the front of each are context only (none at a border)."""
    for interval in manifest.intervals(split):
        for start in range(interval.start, interval.end, _CHUNK):
            context = min(max_order, start - interval.start)
            yield manifest.read(interval.contig, start - context, min(start + _CHUNK, interval.end)), context


def _words(ids: np.ndarray, context: int, max_order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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


def fit(manifest: Manifest, max_order: int = MAX_ORDER) -> list[np.ndarray]:
    """Log-probabilities [4 ** (k + 1)] of each word's last base given those before it, for k = 0 ... max_order."""
    counts = [np.zeros(4 ** (order + 1), dtype=np.int64) for order in range(max_order + 1)]
    for ids, context in _chunks(manifest, "train", max_order):
        for count, (word, whole) in zip(counts, _words(ids, context, max_order), strict=True):
            count += np.bincount(word[whole], minlength=count.size)
    tables = [count.reshape(-1, 4) + 1.0 for count in counts]
    return [np.log(table / table.sum(axis=1, keepdims=True)).ravel() for table in tables]


def markov_perplexity(manifest: Manifest, split: str = "val", max_order: int = MAX_ORDER) -> list[float]:
    """Perplexity of the chains of order 0 ... max_order on a split: every A, C, G and T but an interval's first.

    Raises:
        DataError: the split has no base to score.
    """
    tables = fit(manifest, max_order)
    losses, scored_bases = np.zeros(max_order + 1), 0
    for ids, context in _chunks(manifest, split, max_order):
        scored = (ids[context:] >= A) & (ids[context:] <= T)
        scored[: 0 if context else 1] = False
        best = np.zeros(scored.size)
        for order, (word, whole) in enumerate(_words(ids, context, max_order)):
            best[whole] = tables[order][word[whole]]
            losses[order] -= best[scored].sum()
        scored_bases += int(scored.sum())
    if not scored_bases:
        raise DataError(f"{manifest.directory} has no base of split {split!r} to score; build shards with some")
    return [exp(loss / scored_bases) for loss in losses]
