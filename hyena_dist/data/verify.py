"""Re-read shards from end to end and compare them with their index and with the FASTA files they came from.

The FASTA files are read by another reader than the one that shards are built with, Python's own text files, so that a
fault of either shows.
"""

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset import tariterators

from hyena_dist.config.digests import file_sha256
from hyena_dist.config.plain import open_regular
from hyena_dist.data import fasta, segment, segment1
from hyena_dist.data.build import describe, progress_bar
from hyena_dist.data.contigs import Source, as_dna
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, Shard, open_shard
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.sources import contigs_of, reader_of
from hyena_dist.data.splits import SPLITS
from hyena_dist.data.tokenizer import BYTE_TO_ID

_REMEDY = "copy or build the shard again"


def verify(directory: Path, sources: Sequence[Source] = ()) -> Manifest:
    """Check every byte of a shard directory; with `sources`, also that it holds exactly their bases.

    Raises:
        DataError: the first difference, by file and sample or position.
    """
    manifest = Manifest.load(directory)
    listed = {shard.url for shard in manifest.shards}
    if extra := sorted(path.name for path in directory.glob("*.tar") if path.name not in listed):
        raise DataError(f"{directory / extra[0]}: is not in {FILE_NAME}: the index was altered, or the shard is of "
                        f"another build; move it away, or build the shards again")
    first = 0
    with progress_bar() as progress:
        for shard in progress.track(manifest.shards, description="shards"):
            _check_shard(manifest, shard, range(first, first + shard.nsamples))
            first += shard.nsamples
    if sources:
        _check_fasta(manifest, sources)
    return manifest


def _check_shard(manifest: Manifest, shard: Shard, numbers: range) -> None:
    path = manifest.directory / shard.url
    with os.fdopen(open_shard(manifest.directory, shard), "rb") as file:  # once: what is checked is what is read
        if file_sha256(file) != shard.sha256:
            raise DataError(f"{path}: its sha256 is not the one in {FILE_NAME}: the shard was altered; {_REMEDY}")
        file.seek(0)
        _check_samples(manifest, numbers, path, file)


def _check_samples(manifest: Manifest, numbers: range, path: Path, file: BinaryIO) -> None:
    try:
        members = _members(file)
        expected = [f"{number:08d}.{kind}" for number in numbers for kind in ("json", "seg")]
        if [member.name for member in members] != expected:
            raise DataError(f"{path}: does not hold the samples {numbers.start:08d} to {numbers.stop - 1:08d} that "
                            f"{FILE_NAME} says; {_REMEDY}")
        file.seek(0)
        for number, sample, member in zip(numbers, _samples(file), members[1::2], strict=True):
            if problem := _problem_of(manifest, number, sample, member):
                raise DataError(f"{path}: sample {number:08d} {problem}; {_REMEDY}")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a stranger's tar file may trip the libraries anywhere
        raise DataError(f"{path}: is no tar file of samples ({error!r}); {_REMEDY}") from None


def _members(file: BinaryIO) -> list[tarfile.TarInfo]:
    """What an uncompressed tar holds. Raises TarError: anything but plain files of sizes that fit in it."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
    size = file.seek(0, 2)
    for member in members:
        if not member.isreg() or member.issparse() or not 0 <= member.size <= size - member.offset_data:
            raise tarfile.TarError(f"{member.name!r} is not a plain file")
    return members


def _samples(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The samples of an open shard as WebDataset reads them. It is given the open file and never the file's name, in
    which it would expand braces and obey `pipe:`."""
    return tariterators.group_by_keys(tariterators.tar_file_expander([{"url": "", "stream": file}]))


def _problem_of(manifest: Manifest, number: int, sample: dict[str, Any], member: tarfile.TarInfo) -> str:
    """What is wrong with a sample; nothing: ''."""
    index = manifest.index
    row = index.samples[number]
    rows = index.segments[row.first : row.last]
    about = describe([(manifest.contigs[at.contig], at.start, at.end, SPLITS[at.split]) for at in rows])
    if index.version == 1:
        del about["contig_bases"]
    if (member.offset_data, member.size) != (row.offset, row.nbytes):
        return f"is not where {FILE_NAME} says"
    try:
        if json.loads(sample["json"]) != about:
            return f"describes itself otherwise than {FILE_NAME}"
        bases = (segment if index.version > 1 else segment1).decode(sample["seg"])
    except (ValueError, RecursionError) as error:
        return str(error)
    if bases.size != row.bases:
        return f"has {bases.size} bases, {FILE_NAME} says {row.bases}"
    ids = BYTE_TO_ID[bases]
    for at in rows:
        read = manifest.read(manifest.contigs[at.contig].name, at.start, at.end)
        if not np.array_equal(ids[at.place : at.place + at.end - at.start], read):
            return "reads differently by random access"
    return ""


def records(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Name and ASCII bases of each contig of a file. FASTA is read by a second reader, with the lines as Python's text
    files see them: LF, CR LF and CR end one. Files of other kinds are read by the reader that builds have."""
    if source.vcf or reader_of(source.path) is not fasta.contigs:
        for contig in contigs_of(source):
            yield contig.name, contig.bases
        return
    prefix = f"{source.label}." if source.label else ""
    name, bases = "", bytearray()
    with open_regular(source.path) as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        lines = TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=None)
        for line in lines:
            if line.startswith(">"):
                if name:
                    yield name, np.frombuffer(bytes(bases), np.uint8)
                name, bases = prefix + line[1:].split()[0], bytearray()
            elif name:
                bases += line.rstrip("\n").encode()
            elif not line.isspace():
                raise ValueError("it does not start with a '>' header")
    if name:
        yield name, np.frombuffer(bytes(bases), np.uint8)


def _check_fasta(manifest: Manifest, sources: Sequence[Source]) -> None:
    missing = {info.name: number for number, info in enumerate(manifest.contigs)}
    segments: dict[int, list[int]] = {}
    for key, row in enumerate(manifest.segments):
        segments.setdefault(row.contig, []).append(key)
    held = lru_cache(maxsize=64)(manifest.read_sample)  # many short contigs are in one
    for source in sources:
        try:
            for name, bases in records(source):
                number = missing.pop(name, None)
                if number is None or manifest.contigs[number].bases != bases.size:
                    raise DataError(f"{source.path}: contig {name!r} of {bases.size} bases is not in "
                                    f"{manifest.directory / FILE_NAME}; give the FASTA files that the shards came from")
                stored = as_dna(bases)  # once: it reads all of the contig
                for key in segments.get(number, []):
                    _compare(manifest, key, held, source.path, stored)
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{source.path}: is not a FASTA file that can be read ({error})") from None
    if missing:
        raise DataError(f"{manifest.directory / FILE_NAME}: contig {min(missing)!r} is in none of the FASTA files; "
                        f"give all files that the shards came from")


def _compare(manifest: Manifest, key: int, held: Callable[[int], np.ndarray], path: Path, bases: np.ndarray) -> None:
    """Compare a segment, of the bases that its sample is `held` to have, with all bases of its contig."""
    row = manifest.segments[key]
    own = held(row.sample)[row.place : row.place + row.end - row.start]
    different = np.flatnonzero(own != bases[row.start : row.end])
    if different.size:
        position, contig = row.start + int(different[0]) + 1, manifest.contigs[row.contig].name
        shard = manifest.shards[manifest.index.samples[row.sample].shard].url
        raise DataError(f"{manifest.directory / shard}: sample {row.sample:08d} differs from {path} at "
                        f"{contig}:{position}; build the shards from this file again")
