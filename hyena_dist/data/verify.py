"""Re-read shards from end to end and compare them with their index and with the FASTA files they came from."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset

from hyena_dist.data import segment
from hyena_dist.data.build import contig_info, progress_bar, reading_progress, sha256
from hyena_dist.data.errors import DataError
from hyena_dist.data.fasta import Contig, Source
from hyena_dist.data.manifest import FILE_NAME, Manifest, Shard
from hyena_dist.data.splits import SPLITS
from hyena_dist.data.tokenizer import BYTE_TO_ID

_REMEDY = "copy or build the shard again"


def verify(directory: Path, sources: Sequence[Source] = ()) -> Manifest:
    """Check every byte of a shard directory; with `sources`, also that it holds exactly their bases.

    Raises:
        DataError: the first difference, by file and segment or position.
    """
    manifest = Manifest.load(directory)
    _check_table(manifest)
    rows = iter(range(len(manifest.segments)))
    with progress_bar() as progress:
        for shard in progress.track(manifest.shards, description="shards"):
            _check_shard(manifest, shard, rows)
    if next(rows, None) is not None:
        raise DataError(f"{directory / FILE_NAME}: lists more segments than the shards hold; build the shards again")
    if sources:
        _check_fasta(manifest, sources)
    return manifest


def _check_table(manifest: Manifest) -> None:
    """Segments in order, inside their contigs, and without overlap."""
    place = (0, 0)
    for key, row in enumerate(manifest.segments):
        if not (place <= (row.contig, row.start) and row.start < row.end <= manifest.contigs[row.contig].bases):
            raise DataError(f"{manifest.directory / FILE_NAME}: segment {key:08d} is out of order, overlaps another or "
                            f"leaves its contig; build the shards again")
        place = row.contig, row.end


def _check_shard(manifest: Manifest, shard: Shard, rows: Iterator[int]) -> None:
    path = manifest.directory / shard.url
    if sha256(path) != shard.sha256:
        raise DataError(f"{path}: its sha256 is not the one in {FILE_NAME}: the shard was altered; {_REMEDY}")
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    samples = webdataset.WebDataset(os.fspath(path), shardshuffle=False)
    count = 0
    for count, (sample, key) in enumerate(zip(samples, rows, strict=False), 1):
        problem = _problem_of(manifest, key, sample, offsets.get(f"{key:08d}.seg"))
        if problem:
            raise DataError(f"{path}: segment {key:08d} {problem}; {_REMEDY}")
        if count == shard.nsamples:
            break
    if count != shard.nsamples or len(offsets) != 2 * count:
        raise DataError(f"{path}: holds {len(offsets) / 2:g} samples, {FILE_NAME} says {shard.nsamples}; {_REMEDY}")


def _problem_of(manifest: Manifest, key: int, sample: dict, offset: int | None) -> str:
    """What is wrong with a sample; nothing: ''."""
    row = manifest.segments[key]
    info = manifest.contigs[row.contig]
    about = {"assembly": info.assembly, "contig": info.name, "start": row.start, "end": row.end,
             "split": SPLITS[row.split], "species": info.species}
    try:
        if sample["__key__"] != f"{key:08d}" or offset != row.offset:
            return f"is not where {FILE_NAME} says"
        if json.loads(sample["json"]) != about:
            return f"describes itself otherwise than {FILE_NAME}"
        bases = segment.decode(sample["seg"])
    except KeyError as error:
        return f"has no {error.args[0]!r} member"
    except ValueError as error:
        return str(error)
    if bases.size != row.end - row.start:
        return f"has {bases.size} bases, {FILE_NAME} says {row.end - row.start}"
    if not np.array_equal(BYTE_TO_ID[bases], manifest.read(info.name, row.start, row.end)):
        return "reads differently by random access"
    return ""


def _check_fasta(manifest: Manifest, sources: Sequence[Source]) -> None:
    known = {info.name: index for index, info in enumerate(manifest.contigs)}
    segments: dict[int, list[int]] = {}
    for key, row in enumerate(manifest.segments):
        segments.setdefault(row.contig, []).append(key)
    missing = set(known)
    with reading_progress(sources) as contigs:
        for contig in contigs:
            info = contig_info(contig)
            index = known.get(contig.name)
            if index is None or manifest.contigs[index].bases != info.bases:
                raise DataError(f"{contig.source.path}: contig {contig.name!r} of {info.bases} bases is not in "
                                f"{manifest.directory / FILE_NAME}; give the FASTA files that the shards came from")
            missing.discard(contig.name)
            for key in segments.get(index, []):
                _compare(manifest, key, contig)
    if missing:
        raise DataError(f"{manifest.directory / FILE_NAME}: contig {min(missing)!r} is in none of the FASTA files; "
                        f"give all files that the shards came from")


def _compare(manifest: Manifest, key: int, contig: Contig) -> None:
    row = manifest.segments[key]
    different = np.flatnonzero(manifest.read_segment(key) != contig.bases[row.start : row.end])
    if different.size:
        position = row.start + int(different[0])
        raise DataError(f"{manifest.directory / manifest.shards[row.shard].url}: segment {key:08d} differs from "
                        f"{contig.source.path} at {contig.name}:{position + 1}; build the shards from this file again")
