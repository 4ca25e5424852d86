"""Sequence to shards: every stretch of a split is cut into segments, these go into samples, and the samples into
WebDataset tars with an index. A sample is one whole segment, or as many short ones in a row as fit.

The result is written into a temporary directory beside the target, synced, and renamed as the last act: a build that
was killed or ran out of disk leaves nothing that looks whole. The same input gives the same bytes.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress
from webdataset import TarWriter

from hyena_dist.config.digests import file_sha256
from hyena_dist.config.whole import new_directory
from hyena_dist.data import segment
from hyena_dist.data.census import Census
from hyena_dist.data.contigs import Contig, Source, as_dna
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, ContigInfo, Index, Shard, tables
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.splits import SPLITS, Splits, Stretch

SEGMENT_BASES = 1 << 20
SHARD_BASES = 1 << 30
"""Bases after which a new shard begins; 256 MB."""
_ENDINGS = {".gz", ".bgz", ".fa", ".fasta", ".fna", ".ffn", ".txt", ".gb", ".gbk", ".gbff", ".2bit", ".jsonl", ".json",
            ".parquet"}


@lru_cache
def _assembly(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in _ENDINGS:
        name = Path(name).stem
    return name


def contig_info(contig: Contig) -> ContigInfo:
    """The index's row of a contig: its assembly is called as its file, its species by the file's label."""
    assembly = _assembly(contig.source.path)
    return ContigInfo(contig.name, contig.bases.size, assembly, contig.source.label or assembly)


class _Sink:
    """The file under a tar writer. After a failed write it swallows what comes: the writer tries once more when it is
    collected, and would then complain a second time."""

    def __init__(self, file: BinaryIO):
        self.file, self.failed = file, False

    def write(self, data: bytes) -> None:
        if not self.failed:
            self.failed = True
            self.file.write(data)
            self.failed = False


def describe(pieces: Sequence[tuple[ContigInfo, int, int, str]]) -> dict[str, Any]:
    """What the JSON of a sample says of its segments: for each field one value, or a list of one for each segment where
    they differ."""
    fields: dict[str, list[Any]] = {
        "assembly": [info.assembly for info, *_ in pieces],
        "contig": [info.name for info, *_ in pieces],
        "contig_bases": [info.bases for info, *_ in pieces],
        "start": [start for _, start, _, _ in pieces],
        "end": [end for _, _, end, _ in pieces],
        "split": [split for *_, split in pieces],
        "species": [info.species for info, *_ in pieces],
    }
    return {key: values[0] if len(set(values)) == 1 else values for key, values in fields.items()}


class _ShardWriter:
    """Writes segments into samples, samples into shards, one open shard at a time, and collects the tables of the
    index."""

    def __init__(self, directory: Path, contigs: list[ContigInfo], sample_bases: int, shard_bases: int):
        self.directory, self.contigs = directory, contigs
        self.sample_bases, self.shard_bases = sample_bases, shard_bases
        self.segments: list[tuple[int, int, int, int]] = []
        self.samples: list[tuple[int, int, int, int]] = []
        self.shards: list[Shard] = []
        self._pieces: list[tuple[ContigInfo, int, int, str]] = []
        self._bases: list[np.ndarray] = []
        """Of the sample under way, a piece each."""
        self._size = 0
        self._file: BinaryIO | None = None

    def write(self, bases: np.ndarray, start: int, end: int, split: str) -> None:
        """Append a segment of the contig that came last into the contigs; `bases` are all of that contig."""
        if self._size + end - start > self.sample_bases:
            self._flush()
        info = self.contigs[-1]
        self.segments.append((len(self.contigs) - 1, start, end, SPLITS.index(split)))
        self._pieces.append((info, start, end, split))
        self._bases.append(bases[start:end].copy())  # a view would keep the whole contig in memory
        self._size += end - start

    def _flush(self) -> None:
        """Write the sample under way."""
        if not self._pieces:
            return
        if self._file is None:
            self._open()
        data = segment.encode(np.concatenate(self._bases))
        about = json.dumps(describe(self._pieces), separators=(",", ":"))
        self._tar.write({"__key__": f"{len(self.samples):08d}", "json": about.encode(), "seg": data})
        self.samples.append((len(self.shards), 0, len(data), len(self._pieces)))
        self._shard_size += self._size
        self._pieces, self._bases, self._size = [], [], 0
        if self._shard_size >= self.shard_bases:
            self._close_shard()

    def _open(self) -> None:
        self._path = self.directory / f"shard-{len(self.shards):05d}.tar"
        self._file = self._path.open("wb")
        self._tar = TarWriter(_Sink(self._file), user="root", group="root", mtime=0, encoder=False)
        self._first, self._shard_size = len(self.samples), 0

    def close(self) -> Index:
        """Write what is under way; the index of all that was written."""
        self._flush()
        self._close_shard()
        return Index(self.contigs, self.shards, *tables(self.samples, self.segments))

    def _close_shard(self) -> None:
        """Finish the open shard: enter its offsets, size and digest into the tables."""
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._file = None
        end = self._enter_offsets()
        os.truncate(self._path, end + 2 * tarfile.BLOCKSIZE)
        with self._path.open("rb") as file:
            digest = file_sha256(file)
        count = len(self.samples) - self._first
        self.shards.append(Shard(self._path.name, count, self._path.stat().st_size, digest, self._shard_size))

    def _enter_offsets(self) -> int:
        """Put each sample's place in the tar into its row; returns where the last member ends.

        What follows that end but the two closing blocks is padding of tape records, of no use here.
        """
        end, row = 0, self._first
        with tarfile.open(self._path) as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.name.endswith(".seg"):
                    shard, _, nbytes, count = self.samples[row]
                    self.samples[row] = shard, member.offset_data, nbytes, count
                    row += 1
        return end


def progress_bar() -> Progress:
    """A bar on stderr that is seen on a terminal only, and gone when it is done."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def reading_progress(sources: Sequence[Source]) -> Iterator[Iterator[Contig]]:
    """The contigs of these files, with a progress bar on stderr."""
    total = sum(source.path.stat().st_size for source in sources if source.path.is_file())
    with progress_bar() as progress:
        task = progress.add_task("reading", total=total)
        yield read_contigs(sources, lambda count: progress.advance(task, count))


def _stored(sources: Sequence[Source], splits: Splits, census: Census) -> Iterator[tuple[Contig, list[Stretch]]]:
    """Each contig as shards hold it, with its stretches; at the end all that was read is checked.

    Raises:
        DataError: bad input, or splits that are worth nothing.
    """
    with reading_progress(sources) as contigs:
        for contig in contigs:
            stretches = splits.stretches(contig.name, contig.bases.size)
            stored = contig._replace(bases=as_dna(contig.bases))
            census.add(contig, stored, contig_info(contig), stretches, holds_out=bool(splits.wanted))
            yield stored, stretches
    splits.check_contigs({info.name for info in census.contigs})
    census.check(splits)


def survey(sources: Sequence[Source], splits: Splits) -> Census:
    """Read and check everything as a build does, write nothing: what was found."""
    census = Census()
    for _ in _stored(sources, splits, census):
        pass
    return census


def build(sources: Sequence[Source], target: Path, splits: Splits, *, census: Census | None = None,
          segment_bases: int = SEGMENT_BASES, shard_bases: int = SHARD_BASES) -> Manifest:
    """Write the shards and `shards.json` of these FASTA files into the new directory `target`.

    Args:
        census: where to count what was found; empty.

    Raises:
        DataError: bad input, splits that are worth nothing, or `target` exists.
        OSError: the disk is full or cannot be written. Nothing is left behind.
    """
    if target.exists():
        raise DataError(f"{target}: exists; remove it or give another --out")
    census = Census() if census is None else census
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(new_directory(target))
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise DataError(f"{target}: no such directory can be made ({error.strerror}); give another --out") from None
        writer = _ShardWriter(directory, census.contigs, segment_bases, shard_bases)
        for contig, stretches in _stored(sources, splits, census):
            for stretch in stretches:
                for start in range(stretch.start, stretch.end, segment_bases):
                    writer.write(contig.bases, start, min(start + segment_bases, stretch.end), stretch.split)
        index = writer.close()
        (directory / FILE_NAME).write_text(index.to_json(target.name), encoding="utf-8")
    return Manifest.load(target)
