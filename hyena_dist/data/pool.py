"""What a stream of windows draws from: a whole shard set, or what lies inside the regions of a BED."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from hyena_dist.config.digests import json_sha256
from hyena_dist.config.sections.data import DataSection
from hyena_dist.data.bed import Bed, Span, merged, overlap
from hyena_dist.data.cache import cached
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Interval, Manifest

logger = logging.getLogger(__name__)


class Pool:
    """Bases of a shard set, as one source of windows.

    Args:
        name: for metrics; "" where there is only one pool.
        regions: merged spans by contig; None: everything.
        bed: where they are from, for messages.
    """

    def __init__(self, manifest: Manifest, *, name: str = "", regions: Mapping[str, list[Span]] | None = None,
                 bed: Path | None = None) -> None:
        self.manifest, self.name, self._regions = manifest, name, regions
        self.where = (f"data.mixture: source {name}: " if name else "") + str(manifest.directory) + (
            f" inside the regions of {bed}" if bed else "")

    def intervals(self, split: str) -> list[Interval]:
        """The stretches of a split that are in the pool, in order."""
        whole = self.manifest.intervals(split)
        if self._regions is None:
            return whole
        return [Interval(interval.contig, start, end, interval.first_base + start - interval.start)
                for interval in whole
                for start, end in overlap(interval.start, interval.end, self._regions.get(interval.contig, []))]

    def species_of(self, contig: str) -> str:
        """The species of a contig of the shards."""
        return self._species[contig]

    @cached_property
    def _species(self) -> dict[str, str]:
        return {contig.name: contig.species for contig in self.manifest.contigs}

    @cached_property
    def train_bases(self) -> int:
        """Bases of split train."""
        return sum(interval.bases for interval in self.intervals("train"))

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides which windows come and what is in them."""
        if self._regions is None:
            return self.manifest.identity
        return json_sha256([self.manifest.identity, self._regions])


def pool_with_regions(manifest: Manifest, name: str, bed: Path) -> Pool:
    """The bases of a shard set inside the rows of a BED. Rows past the end of their contig are cut, those of contigs
    that the shards do not have are left out; it is logged how many.

    Raises:
        DataError: the BED cannot be read, or has no base of the shards.
    """
    rows = Bed(bed, cut=True)
    bases = {contig.name: contig.bases for contig in manifest.contigs}
    rows.check_contigs(bases)
    spans = {contig: merged((row.start, row.end) for row in rows.of(contig, length))
             for contig, length in bases.items()}
    regions = {contig: found for contig, found in spans.items() if found}
    for note in rows.note():
        logger.warning("data.mixture: source %s: %s", name, note)
    if not regions:
        raise DataError(f"data.mixture: source {name}: {bed} has no base of {manifest.directory}: give a BED of this "
                        f"assembly, with its names of contigs (chr1 or 1?)")
    return Pool(manifest, name=name, regions=regions, bed=bed)


def open_pools(data: DataSection, *, copy: bool = False) -> list[Pool]:
    """The sources of a run: those of its mixture, or the one shard set. Each set is opened once.

    Args:
        copy: into `data.cache`, if there is one, and open that: for a run, not for whoever only looks.

    Raises:
        DataError: a shard set or a BED cannot be read, or they do not fit each other.
    """
    def opened_from(directory: Path) -> Manifest:
        if copy and data.cache:
            limit = None if data.cache_gb is None else 1e9 * data.cache_gb
            directory = cached(directory, Path(data.cache), limit)
        return Manifest.load(directory)

    if data.mixture is None:
        return [Pool(opened_from(Path(data.shards)))]
    opened: dict[Path, Manifest] = {}
    pools = []
    for source in data.sources():
        directory = Path(data.shards) / (source.shards or "")
        if directory not in opened:
            opened[directory] = opened_from(directory)
        manifest = opened[directory]
        pools.append(Pool(manifest, name=source.name) if source.regions is None
                     else pool_with_regions(manifest, source.name, Path(source.regions)))
    return pools


def identity_of(pools: Sequence[Pool]) -> str:
    """Digest of all that decides which windows of these pools come, but for their weights."""
    return pools[0].identity if len(pools) == 1 else json_sha256([pool.identity for pool in pools])


def first_weights(data: DataSection, pools: Sequence[Pool]) -> list[float]:
    """The weights of the sources from the first step on."""
    if data.mixture_temperature is not None:
        return [pool.train_bases ** data.mixture_temperature for pool in pools]
    return [1.0] if data.mixture is None else [source.weight or 0.0 for source in data.sources()]
