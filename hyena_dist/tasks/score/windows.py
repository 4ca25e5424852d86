"""Windows of variants, many at a time: which are needed, and their token ids on both strands."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hyena_dist.data.tokenizer import COMPLEMENT, PAD
from hyena_dist.data.variants import Site, window_of

STRANDS = 2
ALLELES = 2


class Batch(NamedTuple):
    """Windows for a forward pass, and what is looked at in them. Each variant has an entry in its reference window and
    one in its alternative one, on each strand."""

    ids: np.ndarray
    """uint8 [B, L], PAD behind the end of a shorter window."""
    lengths: np.ndarray
    """int64 [B]."""
    row: np.ndarray
    """int64 [E], the window of each entry."""
    first: np.ndarray
    """int64 [E], the allele's first token in the window, as it is read on its strand,"""
    behind: np.ndarray
    """and the first behind it."""
    variant: np.ndarray
    """int64 [E], the entry's variant,"""
    allele: np.ndarray
    """int64 [E], 0 of the reference and 1 of the alternative,"""
    strand: np.ndarray
    """int64 [E], 0 forward and 1 reverse."""


class _Windows(NamedTuple):
    """Of a chunk, each int64 [W]; a reference window is one without an edit."""

    start: np.ndarray
    length: np.ndarray
    at: np.ndarray
    removed: np.ndarray
    added: np.ndarray
    alt: np.ndarray
    """Where the window's new bases begin in those of the chunk."""


def batches(sites: Sequence[Site], reference: np.ndarray, window: int, size: int) -> Iterator[Batch]:
    """The windows of some variants: each reference window once, whatever the number of variants that have it.

    Args:
        reference: uint8 [bases] token ids.
        size: windows of a batch.
    """
    places = np.array([window_of(site, window) for site in sites], np.int64).reshape(-1, 2)
    unique, of_variant = np.unique(places, axis=0, return_inverse=True)
    at, removed, added = (np.array(values, np.int64) for values in (
        [site.at for site in sites], [site.removed for site in sites], [site.alt.size for site in sites]))
    alts = np.concatenate([site.alt for site in sites])
    none = np.zeros(len(unique), np.int64)
    windows = _Windows(*(np.concatenate(both) for both in (
        (unique[:, 0], places[:, 0]), (unique[:, 1], places[:, 1]), (unique.sum(1), at), (none, removed),
        (none, added), (none, np.cumsum(added) - added))))
    count = len(sites)
    entries = np.array([of_variant.reshape(-1), np.arange(count) + len(unique)])  # [allele, variant]: its window
    items = np.arange(len(windows.start) * STRANDS)  # window, then strand
    items = items[np.argsort(-windows.length[items // STRANDS], kind="stable")]  # so that little is padded
    rank = np.empty_like(items)
    rank[items] = np.arange(items.size)
    item = entries[..., None] * STRANDS + np.arange(STRANDS)  # [allele, variant, strand]
    allele, variant, strand = (index.reshape(-1) for index in np.indices(item.shape))
    place = rank[item.reshape(-1)]
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(0, items.size + size, size))
    for number, begin in enumerate(range(0, items.size, size)):
        chosen = items[begin : begin + size]
        mine = order[bounds[number] : bounds[number + 1]]
        ids, lengths = _assemble(windows, chosen, reference, alts)
        width = np.where(allele[mine] == 0, removed[variant[mine]], added[variant[mine]])
        forward = at[variant[mine]] - places[variant[mine], 0]
        length = lengths[place[mine] - begin]
        first = np.where(strand[mine] == 0, forward, length - forward - width)
        yield Batch(ids, lengths, place[mine] - begin, first, first + width, variant[mine], allele[mine], strand[mine])


def _assemble(windows: _Windows, items: np.ndarray, reference: np.ndarray,
              alts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L] of windows and strands, and their lengths [B]."""
    start, length, at, removed, added, alt = (values[items // STRANDS] for values in windows)
    column = np.arange(length.max())
    shift = np.where(column >= (at - start + added)[:, None], (removed - added)[:, None], 0)
    ids = reference[np.minimum(start[:, None] + column + shift, reference.size - 1)]
    row = np.repeat(np.arange(items.size), added)
    within = np.arange(row.size) - np.repeat(np.cumsum(added) - added, added)
    ids[row, (at - start)[row] + within] = alts[alt[row] + within]
    reverse = np.flatnonzero(items % STRANDS)
    from_end = np.maximum(length[reverse, None] - 1 - column, 0)
    ids[reverse] = COMPLEMENT[np.take_along_axis(ids[reverse], from_end, 1)]
    ids[column >= length[:, None]] = PAD
    return ids, length
