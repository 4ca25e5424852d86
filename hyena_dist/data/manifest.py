"""A shard directory: the stretches of its splits, and random access to the bases.

Bases are read with `os.pread` at offsets from the index: no file position exists that processes could share, forked or
not.
"""

import logging
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyena_dist.data import segment, segment1
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, Index, open_shard, read_index
from hyena_dist.data.splits import SPLITS

MOST_OPEN = 128
"""Shards that are open at a time, in each process that reads; the one that was read longest ago is closed."""
_FILES = 4 * MOST_OPEN
"""Files that a process should be allowed to open; a run has others than shards."""

logger = logging.getLogger(__name__)


def _most_open() -> int:
    """How many shards this process may keep open: a quarter of all files. Raises the limit of those where it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and soft < min(hard, _FILES):
        soft = min(hard, _FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, soft // 4))


class Interval(NamedTuple):
    """Bases [start, end) of a contig that are of one split; windows are cut inside an interval."""

    contig: str
    start: int
    end: int
    first_base: int
    """Place of the start in the concatenation of all contigs; what `Manifest.fill` takes."""

    @property
    def bases(self) -> int:
        return self.end - self.start


class Manifest:
    """A shard directory that was opened. Cheap to pickle and safe to fork: shards are opened when first read."""

    def __init__(self, directory: Path, index: Index):
        self.directory, self.index = directory, index
        self.contigs, self.shards, self.segments = index.contigs, index.shards, index.segments
        self.identity = index.identity
        self._contig_starts = [0, *np.cumsum([contig.bases for contig in self.contigs]).tolist()]
        self._contig_index = {contig.name: i for i, contig in enumerate(self.contigs)}
        self._segment_starts = [self._contig_starts[row.contig] + row.start for row in self.segments]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._most = MOST_OPEN
        self._layouts: dict[int, segment.Layout] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Manifest":
        """Read `shards.json` and check that every shard is there with its size.

        Raises:
            DataError: not a shard directory, another version, or a shard that is missing or not of its size.
        """
        manifest = cls(Path(directory), read_index(Path(directory) / FILE_NAME))
        for shard in manifest.shards:
            os.close(open_shard(manifest.directory, shard))
        if manifest.index.version == 1:
            logger.warning("%s: shards of format 1 have no checksums, and damage is not noticed; build them again",
                           manifest.directory)
        return manifest

    def intervals(self, split: str) -> list[Interval]:
        """The stretches of a split, in order; adjacent segments are one stretch."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        found: list[Interval] = []
        for row, first_base in zip(self.segments, self._segment_starts, strict=True):
            if SPLITS[row.split] != split:
                continue
            name = self.contigs[row.contig].name
            if found and found[-1].contig == name and found[-1].end == row.start:
                found[-1] = found[-1]._replace(end=row.end)
            else:
                found.append(Interval(name, row.start, row.end, first_base))
        return found

    def read(self, contig: str, start: int, end: int) -> np.ndarray:
        """Token ids (uint8) of bases [start, end) of a contig.

        Raises:
            ValueError: the shards do not hold all of these bases.
            DataError: the shards are damaged there.
        """
        if contig not in self._contig_index:
            raise ValueError(f"contig {contig!r} is not in {self.directory}")
        index = self._contig_index[contig]
        if not 0 <= start <= end <= self.contigs[index].bases:
            raise ValueError(f"{contig}:{start}-{end} lies outside its contig of {self.contigs[index].bases} bases")
        ids = np.empty(end - start, dtype=np.uint8)
        self.fill(ids, self._contig_starts[index] + start)
        return ids

    def read_sample(self, number: int) -> np.ndarray:
        """The ASCII bases of a sample, exactly as in the FASTA file, one segment after the other.

        Raises:
            DataError: it is damaged.
        """
        sample = self.index.samples[number]
        file = self._file_of(sample.shard)
        try:
            data = segment.Place(file, sample.offset, sample.nbytes).read(0, sample.nbytes)
            return (segment if self.index.version > 1 else segment1).decode(data)
        except (DataError, OSError) as error:
            raise self._damaged(number, error) from None

    def fill(self, ids: np.ndarray, first_base: int, *, soft: bool = False) -> None:
        """Write the token ids from this place of the concatenated contigs on into `ids`, to its end.

        Args:
            soft: add SOFT to the ids of soft-masked bases.

        Raises:
            ValueError: the shards do not hold all of these bases.
            DataError: the shards are damaged there.
        """
        row, filled, size = bisect_right(self._segment_starts, first_base) - 1, 0, ids.size
        while filled < size:
            if row < 0 or row >= len(self.segments):
                raise ValueError(f"{self.directory} holds no base {first_base + filled} of its contigs")
            _, start, end, _, number, place = self.segments[row]
            local = first_base + filled - self._segment_starts[row]
            count = min(end - start - local, size - filled)
            if local < 0 or count <= 0:
                raise ValueError(f"{self.directory}: base {first_base + filled} of its contigs is in no split")
            sample = self.index.samples[number]
            file = self._files.get(sample.shard)
            if file is None or len(self._files) == self._most:
                file = self._file_of(sample.shard)
            layout = self._layouts.get(number) or self._layout_of(number, file)
            try:
                layout.fill(file, sample.offset, place + local,
                            ids if count == size else ids[filled : filled + count], soft)
            except (DataError, OSError) as error:
                raise self._damaged(number, error) from None
            filled += count
            row += 1

    def _layout_of(self, number: int, file: int) -> segment.Layout:
        sample = self.index.samples[number]
        kind = segment.BlockLayout if self.index.version > 1 else segment1.PlainLayout
        try:
            layout = kind.read(segment.Place(file, sample.offset, sample.nbytes), sample.bases)
        except (DataError, OSError) as error:
            raise self._damaged(number, error) from None
        self._layouts[number] = layout
        return layout

    def _damaged(self, number: int, why: DataError | OSError) -> DataError:
        if isinstance(why, OSError):
            why = DataError(f"it cannot be read ({why.strerror})")
        sample = self.index.samples[number]
        row = self.segments[sample.first]
        contig = self.contigs[row.contig].name
        return DataError(f"{self.directory / self.shards[sample.shard].url}: sample {number:08d} (from "
                         f"{contig}:{row.start + 1} on) is damaged: {why}; run shards/verify.py, copy or build the "
                         f"shard again")

    def _file_of(self, shard: int) -> int:
        """An open shard, from now on the one that was read last."""
        if shard not in self._files:
            return self._open(shard)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        """Open a shard, in place of the one that was read longest ago where as many are open as may be."""
        if not self._files:
            self._most = _most_open()
        while len(self._files) >= self._most:
            os.close(self._files.popitem(last=False)[1])
        file = self._files[shard] = open_shard(self.directory, self.shards[shard])
        return file

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._close()
