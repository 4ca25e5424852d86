"""Held-out bases, and the groups by which a perplexity of them is read: source, species, the share of G and C of a
window, upper and lower case, and the classes of a BED."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.manifest import Interval
from hyena_dist.data.pool import Pool
from hyena_dist.data.regions import OUTSIDE, Regions
from hyena_dist.data.stream import Batch, ValidationBatches
from hyena_dist.data.tokenizer import NUCLEOTIDES, Tokenizer
from hyena_dist.model.evaluate import CASES, SplitLoss, soft_kinds

DECILES = 10

logger = logging.getLogger(__name__)


class HeldOut:
    """The windows of a split of some pools, as `ValidationBatches` has them, each in a class of windows, and each of
    their bases of a kind: of k-mers all bases that a token tells are of the kind of its last. Every group is some
    classes or some kinds.

    Args:
        regions: a BED whose fourth column is a class of bases; None: there are none.
        tokenizer: makes tokens of the bases.

    Raises:
        ConfigError: the split has no bases.
        DataError: shards or BED cannot be read, or do not fit each other.
    """

    def __init__(self, pools: Sequence[Pool], *, split: str, seq_len: int, batch_size: int,
                 regions: Path | None = None, tokenizer: Tokenizer = NUCLEOTIDES) -> None:
        self._seq_len, self.tokenizer = seq_len, tokenizer
        self.batches = ValidationBatches(pools, split=split, seq_len=seq_len, batch_size=batch_size,
                                         tokenizer=tokenizer)
        if not self.batches.windows:
            raise ConfigError(f"{' and '.join(pool.where for pool in pools)}: no bases of split {split} to score: "
                              "build the shards with some")
        deciles, names = _gc_deciles(self.batches)
        count = len(names)
        self.class_of = (np.array(self.batches.class_of) * count + deciles).tolist()
        self._of_window = np.array([*self.class_of, 0])
        """As an array, with one more: an interval without a window may be the last."""
        self.classes = len(self.batches.classes) * count
        self.of_classes: dict[str, list[Collection[str]]] = {
            "source": [(source,) if source else () for source, _ in self.batches.classes for _ in names],
            "species": [(species,) for _, species in self.batches.classes for _ in names],
            "G and C": [name for _ in self.batches.classes for name in names]}
        """Of each class of windows, its groups, by what they are told apart."""
        self._regions = None if regions is None else _open_regions(regions, pools)
        classes = [] if self._regions is None else self._regions.classes
        self.kinds = len(CASES) * max(1, len(classes))
        self.of_kinds: dict[str, list[Collection[str]]] = {"case": [*CASES] * max(1, len(classes))}
        """The same of each kind of bases."""
        if classes:
            self.of_kinds["region"] = [names for names in classes for _ in CASES]
        self._windows_before = _windows_before(pools, split, seq_len, tokenizer)

    def kinds_of(self, batch: Batch) -> torch.Tensor:
        """int64 [B, l], the kind of each target of a batch."""
        kinds = soft_kinds(batch)
        if self._regions is not None:
            for row, number in zip(kinds, batch.windows.tolist(), strict=True):
                if number < len(self.batches.windows):
                    _, ((interval, base, _),) = self.batches.windows[number]
                    stride = self.tokenizer.stride  # from the last base of a token to that of the next
                    start = interval.start + base + self.tokenizer.bases(2) - 1
                    stop = min(start + stride * (row.numel() - 1) + 1, interval.end)
                    labels = self._regions.labels(interval.contig, start, stop)[::stride]
                    row[: labels.size] += len(CASES) * torch.from_numpy(labels)
        return kinds

    def regions_without(self, found: SplitLoss) -> list[str]:
        """The classes of the BED of which no base was scored; none where there is no BED."""
        names = self.of_kinds.get("region", [])
        return sorted({name for of_kind in names for name in of_kind} - {OUTSIDE} - found.by_kind(names).keys()
                      ) if names else []

    def places(self, number: int, interval: Interval, start: int,
               soft: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the model scores bases in a row, each int64 [n]: in which window, at which of its targets, from 0, and
        the kind of the base. The token number t of an interval, counted from 0, is a target of its window (t - 1) // L.

        Args:
            number: of the interval, over all pools.
            start: the place in it of the first of the bases.
            soft: bool [n], which are soft-masked.
        """
        k, stride = self.tokenizer.k, self.tokenizer.stride
        bases = np.arange(start, start + soft.size)
        last = np.minimum(bases // stride * stride + stride - 1, bases[-1])  # of its token; `start` is one's first
        targets = np.maximum((last - (k - 1)) // stride - 1, 0)
        kinds = soft.astype(np.int64)
        if self._regions is not None:
            first = interval.start + start
            kinds += len(CASES) * self._regions.labels(interval.contig, first, first + soft.size)
        return self._windows_before[number] + targets // self._seq_len, targets % self._seq_len, kinds[last - start]

    def label(self, number: int, interval: Interval, start: int, soft: np.ndarray) -> np.ndarray:
        """For the Markov chains: kind and class of bases in a row, as kind * classes + class; arguments as `places`."""
        windows, _, kinds = self.places(number, interval, start, soft)
        return kinds * self.classes + self._of_window[windows]


def _open_regions(path: Path, pools: Sequence[Pool]) -> Regions:
    bases: dict[str, int] = {}
    for contig in (contig for pool in pools for contig in pool.manifest.contigs):
        if bases.setdefault(contig.name, contig.bases) != contig.bases:
            raise ConfigError(f"--regions {path}: two sources have a contig {contig.name}, of {bases[contig.name]:,} "
                              f"and of {contig.bases:,} bases, so that its rows may be of either: score one source at "
                              "a time, with --shards DIR")
    regions = Regions(path, bases)
    for note in regions.note:
        logger.warning("--regions: %s", note)
    return regions


def _windows_before(pools: Sequence[Pool], split: str, seq_len: int, tokenizer: Tokenizer) -> list[int]:
    """How many windows come before those of each interval."""
    counts = [len(range(0, tokenizer.tokens(interval.bases) - 1, seq_len))
              for pool in pools for interval in pool.intervals(split)]
    return np.cumsum([0, *counts]).tolist()


def _gc_deciles(batches: ValidationBatches) -> tuple[np.ndarray, list[Collection[str]]]:
    """The decile of each window by the share of G and C among its scored bases, int64 [windows], and the name of each
    decile. Windows without such bases are in one more, which has no name."""
    shares = np.full(len(batches.windows), np.nan)
    for batch in batches:
        ids, tokenizer = batch.ids.numpy(), batch.tokenizer
        known = tokenizer.stride * tokenizer.scored(ids).sum(-1)
        strong = tokenizer.strong(ids).sum(-1)
        windows = batch.windows.numpy()
        inside = (windows < shares.size) & (known > 0)
        shares[windows[inside]] = strong[inside] / known[inside]
    has = ~np.isnan(shares)
    deciles = np.full(shares.size, DECILES)
    names: list[Collection[str]] = [()] * (DECILES + 1)
    if has.any():
        edges = np.quantile(shares[has], np.arange(1, DECILES) / DECILES)
        deciles[has] = np.searchsorted(edges, shares[has], "right")
        for decile in np.unique(deciles[has]).tolist():
            inside = shares[has & (deciles == decile)]
            names[decile] = (f"decile {decile + 1}: {inside.min():.3f} to {inside.max():.3f}",)
    return deciles, names


def in_order(name: str) -> tuple[int, str]:
    """A key to sort names of groups by: decile 10 comes behind decile 9."""
    return len(name.partition(":")[0]) if name.startswith("decile ") else 0, name
