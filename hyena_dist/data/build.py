"""Sequence to shards: every stretch of a split is cut into segments, these go into samples, and the samples into
WebDataset tars with an index. A sample is one whole segment, or as many short ones in a row as fit.

The result is written into a temporary directory beside the target, synced, and renamed as the last act: a build that
was killed or ran out of disk leaves nothing that looks whole, and is done again from the start. The same input gives
the same bytes, whatever the number of processes.
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
from hyena_dist.data.audit import AUDIT, audit
from hyena_dist.data.census import Census
from hyena_dist.data.contigs import Contig, Source, as_dna
from hyena_dist.data.crew import Crew
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, ContigInfo, Index, Shard, tables
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.measure import Piece, measure
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.splits import SPLITS, Splits, Stretch

SEGMENT_BASES = 1 << 20
SHARD_BASES = 1 << 30
"""Bases after which a new shard begins; 256 MB."""
_BATCH_BASES = 1 << 22
"""Contigs are measured together until they have so many."""
_SMALL = 1 << 23
"""Bytes of files for which no other process is started."""
_ENDINGS = {".gz", ".bgz", ".fa", ".fasta", ".fna", ".ffn", ".txt", ".gb", ".gbk", ".gbff", ".2bit", ".jsonl", ".json",
            ".parquet"}


@lru_cache
def _assembly(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in _ENDINGS:
        name = Path(name).stem
    return name


def contig_info(contig: Contig) -> ContigInfo:
    """The index's row of a contig: its assembly is called as its file, its species by the file's label. A haplotype
    is an assembly of its own."""
    assembly = _assembly(contig.source.path)
    species = contig.source.label or assembly
    if contig.origin:
        assembly = f"{assembly}.{contig.source.sample}.{contig.origin.haplotype}"
    return ContigInfo(contig.name, contig.bases.size, assembly, species)


def _stretches(splits: Splits, contig: Contig) -> list[Stretch]:
    """Of a haplotype, those of the contig that it was made of, carried over."""
    if contig.origin is None:
        return splits.stretches(contig.name, contig.bases.size)
    place = contig.origin.place
    found = (Stretch(place(row.start), place(row.end), row.split)
             for row in splits.stretches(contig.origin.name, contig.origin.bases))
    return [row for row in found if row.start < row.end]


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
    index. A crew packs the samples."""

    def __init__(self, directory: Path, contigs: list[ContigInfo], crew: Crew, sample_bases: int, shard_bases: int):
        self.directory, self.contigs, self._crew = directory, contigs, crew
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
        """Have the sample under way packed and written."""
        if not self._pieces:
            return
        pieces, bases = self._pieces, np.concatenate(self._bases)
        self._crew.do(segment.encode, bases, size=bases.size, then=lambda data: self._write(pieces, bases.size, data))
        self._pieces, self._bases, self._size = [], [], 0

    def _write(self, pieces: list[tuple[ContigInfo, int, int, str]], bases: int, data: bytes) -> None:
        """Write a sample of so many bases."""
        if self._file is None:
            self._open()
        about = json.dumps(describe(pieces), separators=(",", ":"))
        self._tar.write({"__key__": f"{len(self.samples):08d}", "json": about.encode(), "seg": data})
        self.samples.append((len(self.shards), 0, len(data), len(pieces)))
        self._shard_size += bases
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
        self._crew.finish()
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


class _Surveyor:
    """Has contigs measured, many short ones at a time, and enters what is found into a census."""

    def __init__(self, census: Census, crew: Crew):
        self._census, self._crew = census, crew
        self._pieces: list[Piece] = []
        self._infos: list[ContigInfo] = []
        self._size, self._place = 0, 0

    def take(self, contig: Contig, info: ContigInfo, stretches: list[Stretch]) -> None:
        """A contig as shards hold it."""
        self._pieces.append(Piece(contig.bases, stretches, self._place))
        self._infos.append(info)
        self._place += info.bases
        self._size += info.bases
        if self._size >= _BATCH_BASES:
            self.send()

    def send(self) -> None:
        """Have those measured that were taken since the last time."""
        pieces, infos = self._pieces, self._infos
        if pieces:
            self._crew.do(measure, pieces, size=self._size,
                          then=lambda found: self._census.add(infos, [piece.stretches for piece in pieces], found))
        self._pieces, self._infos, self._size = [], [], 0


def _stored(sources: Sequence[Source], splits: Splits, census: Census, crew: Crew,
            allow_copies: float) -> Iterator[tuple[Contig, list[Stretch]]]:
    """Each contig as shards hold it, with its stretches; at the end all that was read is checked.

    Raises:
        DataError: bad input, or splits that are worth nothing.
    """
    surveyor = _Surveyor(census, crew)
    known: set[str] = set()
    with reading_progress(sources) as contigs:
        for contig in contigs:
            stretches = _stretches(splits, contig)
            known.add(contig.origin.name if contig.origin else contig.name)
            stored, info = contig._replace(bases=as_dna(contig.bases)), contig_info(contig)
            census.enter(contig, stored, info)
            surveyor.take(stored, info, stretches)
            yield stored, stretches
    surveyor.send()
    crew.finish()
    splits.check_contigs(known)
    census.check(splits, allow_copies=allow_copies)


def lengths(sources: Sequence[Source]) -> dict[str, int]:
    """Bases of each contig by its name; of haplotypes, of the contigs that they are made of. Reads the files once.

    Raises:
        DataError: as `read_contigs`.
    """
    references = dict.fromkeys(source._replace(vcf=None, sample="") for source in sources)
    with reading_progress([*references]) as contigs:
        return {contig.name: contig.bases.size for contig in contigs}


def _crew_for(sources: Sequence[Source], workers: int) -> Crew:
    """As many workers as asked for, where the files are large enough to be worth their start."""
    size = sum(source.path.stat().st_size for source in sources if source.path.is_file())
    return Crew(workers if size > _SMALL else 1)


def survey(sources: Sequence[Source], splits: Splits, *, workers: int = 1, allow_copies: float = 0.0) -> Census:
    """Read and check everything as a build does, write nothing: what was found."""
    census = Census()
    with _crew_for(sources, workers) as crew:
        for _ in _stored(sources, splits, census, crew, allow_copies):
            pass
    return census


def build(sources: Sequence[Source], target: Path, splits: Splits, *, census: Census | None = None, workers: int = 1,
          allow_copies: float = 0.0, segment_bases: int = SEGMENT_BASES, shard_bases: int = SHARD_BASES) -> Manifest:
    """Write the shards, `shards.json` and `audit.json` of these files into the new directory `target`. The bytes are
    the same whatever the number of workers.

    Args:
        census: where to count what was found; empty.
        workers: processes that measure contigs and pack samples; 1 for none but this one.
        allow_copies: share of what is held out that may also train.

    Raises:
        DataError: bad input, splits that are worth nothing, or `target` exists.
        OSError: the disk is full or cannot be written. Nothing is left behind.
        BrokenProcessPool: a worker was ended from outside. Nothing is left behind.
    """
    if target.exists():
        raise DataError(f"{target}: exists; remove it or give another --out")
    census = Census() if census is None else census
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(new_directory(target))
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise DataError(f"{target}: no such directory can be made ({error.strerror}); give another --out") from None
        crew = stack.enter_context(_crew_for(sources, workers))
        writer = _ShardWriter(directory, census.contigs, crew, segment_bases, shard_bases)
        for contig, stretches in _stored(sources, splits, census, crew, allow_copies):
            for stretch in stretches:
                for start in range(stretch.start, stretch.end, segment_bases):
                    writer.write(contig.bases, start, min(start + segment_bases, stretch.end), stretch.split)
        index = writer.close()
        (directory / FILE_NAME).write_text(index.to_json(target.name), encoding="utf-8")
        (directory / AUDIT).write_text(json.dumps(audit(census), indent=1) + "\n", encoding="utf-8")
    return Manifest.load(target)
