"""The index of a shard directory, `shards.json`: what it says, read strictly and written.

The file is a `wids` index (url, nsamples, filesize of each shard) with sha256 and bases of each shard, and four tables:
sources, contigs, samples and segments. A sample is a member of a shard; it holds one segment, a stretch of a contig, or
several one after the other. `checksum` is the SHA-256 of all the rest: a flipped byte anywhere is noticed.

    sources   assembly, species
    contigs   name, bases, source
    samples   shard, offset of its bytes in the shard, number of bytes, number of segments
    segments  contig, start, end, split (0 train, 1 val, 2 test); in the order of the samples, contigs and starts

Format 1 has one segment a sample, no sources and no checksum: contigs are rows of name, bases, assembly, species, and
segments rows of contig, start, end, split, shard, offset, number of bytes.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyena_dist.config.digests import json_sha256
from hyena_dist.config.errors import read_remedy
from hyena_dist.config.plain import open_regular, regular_descriptor
from hyena_dist.data.errors import DataError
from hyena_dist.data.splits import SPLITS

FILE_NAME = "shards.json"
FORMAT = "hyena-dist-segments"
VERSION = 2
_WIDS_VERSION = 1
_COMMON = {"wids_version", "name", "format", "version", "assembly", "splits", "shardlist", "contigs", "segments"}
_KEYS = {1: _COMMON, 2: _COMMON | {"sources", "samples", "checksum"}}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)


class ContigInfo(NamedTuple):
    """A contig of the index."""

    name: str
    bases: int
    assembly: str
    species: str


class Shard(NamedTuple):
    """A tar file of the index."""

    url: str
    """A plain file name, in the directory of the index. It comes from a file that a stranger may have written: what
    could be a path, a pattern or a command to any reader is refused."""
    nsamples: int
    filesize: int
    sha256: str
    bases: int


class Sample(NamedTuple):
    """`nbytes` from `offset` on of a shard: the segments [first, last) of the table, one after the other."""

    shard: int
    offset: int
    nbytes: int
    first: int
    last: int
    bases: int


class Segment(NamedTuple):
    """Bases [start, end) of a contig, all of one split; they are those from `place` on of a sample."""

    contig: int
    start: int
    end: int
    split: int
    sample: int
    place: int


class Index(NamedTuple):
    """What `shards.json` says."""

    contigs: list[ContigInfo]
    shards: list[Shard]
    samples: list[Sample]
    segments: list[Segment]
    version: int = VERSION

    @property
    def assemblies(self) -> list[str]:
        """Names of the assemblies, in order of their first contig."""
        return list(dict.fromkeys(contig.assembly for contig in self.contigs))

    @property
    def split_bases(self) -> dict[str, int]:
        """Bases of each split."""
        bases = [0] * len(SPLITS)
        for row in self.segments:
            bases[row.split] += row.end - row.start
        return dict(zip(SPLITS, bases, strict=True))

    @property
    def identity(self) -> str:
        """Digest of all that decides which windows come and what is in them; the place of the files does not."""
        segments = [row[:4] for row in self.segments]
        content = [self.version, self.contigs, segments, [shard.sha256 for shard in self.shards]]
        return json_sha256(content)

    def to_json(self, name: str) -> str:
        """The text of `shards.json`."""
        sources = list(dict.fromkeys((contig.assembly, contig.species) for contig in self.contigs))
        place = {source: i for i, source in enumerate(sources)}
        content = {
            "wids_version": _WIDS_VERSION,
            "name": name,
            "format": FORMAT,
            "version": VERSION,
            "assembly": self.assemblies,
            "splits": self.split_bases,
            "shardlist": [shard._asdict() for shard in self.shards],
            "sources": sources,
            "contigs": [(info.name, info.bases, place[info.assembly, info.species]) for info in self.contigs],
            "samples": [(*row[:3], row.last - row.first) for row in self.samples],
            "segments": [row[:4] for row in self.segments],
        }
        content["checksum"] = checksum(content)
        return json.dumps(content, separators=(",", ":")) + "\n"


def checksum(content: dict[str, Any]) -> str:
    """What an index must have as its checksum."""
    return json_sha256({key: value for key, value in content.items() if key != "checksum"})


def read_index(path: Path) -> Index:
    """Read `shards.json`. Every value is of its type and in its range, the tables fit each other, and what can be
    computed from them (splits, assemblies, bases and samples of a shard) is as it says.

    Raises:
        DataError: not the index of shards, another version, damaged, or altered.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); build the shards again") from None
    try:
        return _from_json(path, content)
    except (_DamagedError, RecursionError) as error:  # nested as deeply as can be read, but not written
        raise DataError(f"{path}: is damaged: {error}; copy it again or build the shards again") from None


def _read_text(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); "
                        f"{read_remedy(error, 'write shards with shards/build.py')}") from None


class _DamagedError(Exception):
    """What is wrong with an index."""


def _must(condition: bool, what: str) -> None:
    if not condition:
        raise _DamagedError(what)


def _from_json(path: Path, content: Any) -> Index:
    _must(isinstance(content, dict), "it is not a table")
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int or version not in _KEYS:
        raise DataError(f"{path}: has format {content.get('format')!r} version {version!r}, this code reads {FORMAT!r} "
                        f"version {' or '.join(map(str, _KEYS))}; build the shards again")
    odd = min(map(str, _KEYS[version] ^ set(content)), default="")
    _must(not odd, f"it has {'no' if odd not in content else 'an unknown'} key {odd!r}")
    if version > 1:
        _must(checksum(content) == content["checksum"], "it does not match its checksum")
    _must(type(content["wids_version"]) is int and content["wids_version"] == _WIDS_VERSION, "wids_version is not 1")
    _must(isinstance(content["name"], str), "name is not a string")
    shards = [_shard(row) for row in _list(content["shardlist"], "shardlist")]
    _must(len({shard.url for shard in shards}) == len(shards), "a shard is listed twice")
    if version == 1:
        contigs = [_contig(i, row, _source(row[2:])) for i, row in enumerate(_rows(content, "contigs", 4))]
        rows = _rows(content, "segments", 7, of_numbers=True)
        counted = [[*row[4:], 1] for row in rows]
    else:
        sources = [_source(row) for row in _rows(content, "sources", 2)]
        contigs = [_contig(i, row, _at(sources, row[2])) for i, row in enumerate(_rows(content, "contigs", 3))]
        rows = _rows(content, "segments", 4, of_numbers=True)
        counted = _rows(content, "samples", 4, of_numbers=True)
    _must(len({contig.name for contig in contigs}) == len(contigs), "two contigs have one name")
    samples, segments = tables(counted, rows)
    index = Index(contigs, shards, samples, segments, version)
    _check_segments(index)
    _check_samples(index)
    _must(content["assembly"] == index.assemblies, "assembly is not that of the contigs")
    splits = content["splits"]
    _must(splits == index.split_bases and all(type(bases) is int for bases in splits.values()),
          "splits are not those of the segments")
    return index


def tables(samples: Iterable[Sequence[int]], segments: Sequence[Sequence[int]]) -> tuple[list[Sample], list[Segment]]:
    """Both tables from rows of shard, offset, nbytes, number of segments, and of contig, start, end, split."""
    found, rows, first = [], [], 0
    for number, (shard, offset, nbytes, count) in enumerate(samples):
        place, last = 0, first + count
        for contig, start, end, split, *_ in segments[first:last]:
            rows.append(Segment(contig, start, end, split, number, place))
            place += end - start
        found.append(Sample(shard, offset, nbytes, first, last, place))
        first = last
    _must(first == len(segments), "the samples hold another number of segments than there are")
    return found, rows


def _list(value: Any, what: str) -> list[Any]:
    _must(isinstance(value, list), f"{what} is not a list")
    return value


def _rows(content: dict[str, Any], table: str, columns: int, *, of_numbers: bool = False) -> list[list[Any]]:
    rows = _list(content[table], table)
    for number, row in enumerate(rows):
        fits = isinstance(row, list) and len(row) == columns
        if not fits or of_numbers and not all(type(value) is int and 0 <= value < 1 << 62 for value in row):
            raise _DamagedError(f"row {number} of {table}, {str(row)[:80]!r}, is not of {columns} "
                                f"{'numbers' if of_numbers else 'values'}")
    return rows


def _at(rows: list[Any], number: Any) -> Any:
    _must(type(number) is int and 0 <= number < len(rows), f"there is no source {str(number)[:80]!r}")
    return rows[number]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _source(row: list[Any]) -> list[Any]:
    _must(all(map(_is_name, row)), f"the source {str(row)[:80]!r} is not an assembly and a species")
    return row


def _contig(number: int, row: list[Any], source: list[Any]) -> ContigInfo:
    name, bases = row[:2]
    fits = _is_name(name) and type(bases) is int and 0 < bases < 1 << 62
    _must(fits, f"contig {number} is not a name and a number of bases")
    return ContigInfo(name, bases, *source)


def _shard(row: Any) -> Shard:
    _must(isinstance(row, dict) and set(row) == set(Shard._fields),
          f"a shard is not listed by {', '.join(Shard._fields)}")
    shard = Shard(**row)
    _must(isinstance(shard.url, str) and _PLAIN_NAME.fullmatch(shard.url) is not None,
          f"the url {str(shard.url)[:80]!r} is not a plain file name")
    _must(all(type(n) is int and n > 0 for n in (shard.nsamples, shard.filesize, shard.bases)),
          f"the numbers of {shard.url} are not whole and greater than 0")
    _must(isinstance(shard.sha256, str) and re.fullmatch("[0-9a-f]{64}", shard.sha256) is not None,
          f"the sha256 of {shard.url} is none")
    return shard


def _check_segments(index: Index) -> None:
    """Segments in order, inside their contigs, and without overlap."""
    place = (0, 0)
    for number, row in enumerate(index.segments):
        if not (row.contig < len(index.contigs) and row.split < len(SPLITS) and place <= row[:2]
                and row.start < row.end <= index.contigs[row.contig].bases):
            raise _DamagedError(f"segment {number}, {list(row[:4])}, is out of order, overlaps another, leaves its "
                                f"contig or refers to nothing")
        place = row.contig, row.end


def _check_samples(index: Index) -> None:
    """Samples in order, inside their shards and without overlap, and each shard with as many as it says."""
    place, counts, bases = (0, 0), [0] * len(index.shards), [0] * len(index.shards)
    for number, row in enumerate(index.samples):
        if not (row.shard < len(index.shards) and place <= row[:2] and row.first < row.last
                and row.offset + row.nbytes <= index.shards[row.shard].filesize):
            raise _DamagedError(f"sample {number}, {list(row[:3])}, is out of order, overlaps another, leaves its "
                                f"shard, is empty or refers to nothing")
        place = row.shard, row.offset + row.nbytes
        counts[row.shard] += 1
        bases[row.shard] += row.bases
    for shard, samples, held in zip(index.shards, counts, bases, strict=True):
        _must(samples == shard.nsamples, f"{shard.url} holds {samples} samples, not {shard.nsamples}")
        _must(held == shard.bases, f"{shard.url} holds {held} bases, not {shard.bases}")


def open_shard(directory: Path, shard: Shard) -> int:
    """A descriptor of a shard that is there with its size. Raises DataError: it is not, or cannot be opened."""
    path = directory / shard.url
    try:
        file = regular_descriptor(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); "
                        f"{read_remedy(error, 'copy the shards again, whole')}") from None
    size = os.fstat(file).st_size
    if size != shard.filesize:
        os.close(file)
        raise DataError(f"{path}: has {size} bytes, {FILE_NAME} says {shard.filesize}; the shard was cut short or "
                        f"altered, copy or build it again")
    return file
