"""The index of a shard directory, `shards.json`, and random access to the bases behind it.

The file is a `wids` index (url, nsamples, filesize of each shard) with sha256 and bases of each shard, the contigs, and
a table of segments: contig, start, end, split, shard, and where in the shard the segment's bytes begin. Bases are read
with `os.pread` at offsets from that table: no file position exists that processes could share, forked or not.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyena_dist.data import segment
from hyena_dist.data.errors import DataError
from hyena_dist.data.splits import SPLITS
from hyena_dist.data.tokenizer import BYTE_TO_ID

FILE_NAME = "shards.json"
FORMAT = "hyena-dist-segments"
VERSION = 1


class ContigInfo(NamedTuple):
    """A contig of the index."""

    name: str
    bases: int
    assembly: str
    species: str


class Shard(NamedTuple):
    """A tar file of the index."""

    url: str
    nsamples: int
    filesize: int
    sha256: str
    bases: int


class Segment(NamedTuple):
    """A row of the segment table; the segment is `nbytes` from `offset` on of its shard."""

    contig: int
    start: int
    end: int
    split: int
    shard: int
    offset: int
    nbytes: int


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

    def __init__(self, directory: Path, contigs: list[ContigInfo], shards: list[Shard], segments: list[Segment]):
        self.directory = directory
        self.contigs = contigs
        self.shards = shards
        self.segments = segments
        self.identity = self._identity()
        lengths = [contig.bases for contig in contigs]
        self._contig_starts = [0, *np.cumsum(lengths).tolist()]
        self._contig_index = {contig.name: i for i, contig in enumerate(contigs)}
        self._segment_starts = [self._contig_starts[row.contig] + row.start for row in segments]
        self._files: dict[int, int] = {}
        self._codes: dict[int, segment.CodeRuns] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Manifest":
        """Read `shards.json` and check that every shard is there with its size.

        Raises:
            DataError: not a shard directory, another version, or a shard that is missing or not of its size.
        """
        path = Path(directory) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); write shards with shards/build.py") from None
        except ValueError as error:
            raise DataError(f"{path}: is not JSON ({error}); build the shards again") from None
        try:
            manifest = cls._from_json(path, content)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({error!r}); build the shards again") from None
        for shard in manifest.shards:
            manifest._check_size(shard)
        return manifest

    @classmethod
    def _from_json(cls, path: Path, content: dict[str, Any]) -> "Manifest":
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise DataError(f"{path}: has format {content.get('format')!r} version {content.get('version')!r}, this "
                            f"code reads {FORMAT!r} version {VERSION}; build the shards again")
        contigs = [ContigInfo(*row) for row in content["contigs"]]
        shards = [Shard(**row) for row in content["shardlist"]]
        segments = [Segment(*row) for row in content["segments"]]
        for row in segments:
            if not (all(isinstance(number, int) and number >= 0 for number in row) and row.contig < len(contigs)
                    and row.split < len(SPLITS) and row.shard < len(shards)):
                raise IndexError(f"segment {list(row)} refers to nothing")
        return cls(path.parent, contigs, shards, segments)

    def to_json(self) -> str:
        """The text of `shards.json`."""
        content = {
            "wids_version": 1,
            "name": self.directory.name,
            "format": FORMAT,
            "version": VERSION,
            "assembly": self.assemblies,
            "splits": {split: sum(i.bases for i in self.intervals(split)) for split in SPLITS},
            "shardlist": [shard._asdict() for shard in self.shards],
            "contigs": self.contigs,
            "segments": self.segments,
        }
        return json.dumps(content, separators=(",", ":")) + "\n"

    def _identity(self) -> str:
        """Digest of all that decides which windows come and what is in them; the place of the files does not."""
        content = [VERSION, self.contigs, self.segments, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _check_size(self, shard: Shard) -> None:
        path = self.directory / shard.url
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); copy the shards again, whole") from None
        if size != shard.filesize:
            raise DataError(f"{path}: has {size} bytes, {FILE_NAME} says {shard.filesize}; the shard was cut short or "
                            f"altered, copy or build it again")

    @property
    def assemblies(self) -> list[str]:
        """Names of the assemblies, in order of their first contig."""
        return list(dict.fromkeys(contig.assembly for contig in self.contigs))

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
        """
        if contig not in self._contig_index:
            raise ValueError(f"contig {contig!r} is not in {self.directory}")
        index = self._contig_index[contig]
        if not 0 <= start <= end <= self.contigs[index].bases:
            raise ValueError(f"{contig}:{start}-{end} lies outside its contig of {self.contigs[index].bases} bases")
        ids = np.empty(end - start, dtype=np.uint8)
        self.fill(ids, self._contig_starts[index] + start)
        return ids

    def read_segment(self, row: int) -> np.ndarray:
        """The ASCII bases of a row of the segment table, exactly as in the FASTA file."""
        try:
            return segment.decode(self._pread(row, 0, self.segments[row].nbytes))
        except DataError as error:
            raise self._damaged(row, error) from None

    def fill(self, ids: np.ndarray, first_base: int) -> None:
        """Write the token ids from this place of the concatenated contigs on into `ids`, to its end."""
        row = bisect_right(self._segment_starts, first_base) - 1
        filled = 0
        while filled < ids.size:
            if row < 0 or row >= len(self.segments):
                raise ValueError(f"{self.directory} holds no base {first_base + filled} of its contigs")
            local = first_base + filled - self._segment_starts[row]
            size = self.segments[row].end - self.segments[row].start
            if not 0 <= local < size:
                raise ValueError(f"{self.directory}: base {first_base + filled} of its contigs is in no split")
            count = min(size - local, ids.size - filled)
            self._fill_from(row, local, ids[filled : filled + count])
            filled += count
            row += 1

    def _fill_from(self, row: int, local: int, ids: np.ndarray) -> None:
        """Token ids of one segment from base `local` on."""
        first_byte, end = local // 4, local + ids.size
        packed = self._pread(row, segment.HEADER_BYTES + first_byte, (end + 3) // 4 - first_byte)
        skip = local - 4 * first_byte
        ids[:] = segment.unpack_ids(packed)[skip : skip + ids.size]
        runs = self._codes.get(row) or self._read_codes(row)
        for i in range(bisect_right(runs.ends, local), bisect_left(runs.starts, end)):
            ids[max(runs.starts[i] - local, 0) : runs.ends[i] - local] = BYTE_TO_ID[runs.letters[i]]

    def _read_codes(self, row: int) -> segment.CodeRuns:
        try:
            bases, code_bytes = segment.read_header(self._pread(row, 0, segment.HEADER_BYTES))
            if bases != self.segments[row].end - self.segments[row].start:
                raise DataError(f"has {bases} bases")
            data = self._pread(row, segment.HEADER_BYTES + segment.packed_bytes(bases), code_bytes)
            runs = segment.decode_codes(data)
        except (zlib.error, ValueError) as error:
            raise self._damaged(row, error) from None
        self._codes[row] = runs
        return runs

    def _damaged(self, row: int, why: Exception) -> DataError:
        path = self.directory / self.shards[self.segments[row].shard].url
        return DataError(f"{path}: segment {row:08d} is not as {FILE_NAME} says: {why}; run shards/verify.py, copy or "
                         f"build the shard again")

    def _pread(self, row: int, offset: int, size: int) -> bytes:
        """Bytes of a segment, read at an explicit offset."""
        shard = self.segments[row].shard
        file = self._files.get(shard)
        if file is None:
            self._check_size(self.shards[shard])
            file = self._files[shard] = os.open(self.directory / self.shards[shard].url, os.O_RDONLY)
        data = os.pread(file, size, self.segments[row].offset + offset)
        if len(data) != size:
            raise DataError(f"{self.directory / self.shards[shard].url}: cut short while in use, {len(data)} of {size} "
                            f"bytes of segment {row:08d} read; copy or build it again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)
