"""Files of embeddings: by any number of ranks, killed and resumed at will, the same file byte for byte, in memory that
does not depend on the number of sequences.

The sequences are cut into chunks, which the data ranks do in turn. The rows of each are a file in OUT.parts, which is
whole or not there; when all are there, the first rank joins them.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, agree_where_shared
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.columns import Columns, check_ending, write_columns
from hyena_dist.tasks.embed.inputs import OUTCOMES, Records, Regions, Sequence
from hyena_dist.tasks.embed.states import TOKENS, embed, rows_of
from hyena_dist.tasks.parts import ANOTHER, Parts, names

CHUNK_BASES, CHUNK_SEQUENCES = 2**17, 4096
"""Of a part, which a kill can cost; it has at least one sequence."""
ENDINGS = (".npy", ".parquet")


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    inputs: Records | Regions
    out: Path
    fasta: str
    """Name of the file of sequence, for the header."""
    bin: int | None = None
    """Bases of a row; None: all of a sequence."""
    layer: int | None = None
    """After which layer; None: what the head reads."""

    @property
    def index(self) -> Path:
        """Beside the output: a row for every sequence, and where its rows are."""
        return self.out.with_name(f"{self.out.name}.tsv")


class Result(NamedTuple):
    """What was done."""

    outcomes: dict[str, int]
    rows: int
    bases_now: int
    """That this rank read in this call,"""
    seconds: float
    """in this time."""


class _Survey(NamedTuple):
    outcomes: dict[str, int]
    rows: int
    digest: str
    """sha256 of the names, the places and the bases."""


def write_embeddings(trained: Trained, request: Request, groups: Groups) -> Result:
    """Embed all sequences and write them. Collective.

    Raises:
        UserError: unreadable inputs, nothing to embed, a layer that the model does not have, a file exists, or parts of
            another call lie beside it.
    """
    parts = Parts(request.out)
    found = agree(lambda: _check(trained, request, parts), groups)
    facts = _facts(trained, request, found, groups)
    first = groups.world.rank == 0
    parts.begin(facts, groups)
    start = time.monotonic()
    bases = agree_where_shared(lambda: _embed_chunks(trained, request, found, parts, groups), groups)
    seconds = time.monotonic() - start
    agree(lambda: _finish(trained, request, found, parts, facts) if first else None, groups)
    return Result(found.outcomes, found.rows, bases, seconds)


def _check(trained: Trained, request: Request, parts: Parts) -> _Survey:
    """Refuse what cannot be done, and look at all inputs once."""
    check_ending("--out", request.out, ENDINGS)
    parts.check_outputs({"--out": request.out, "the index of --out": request.index})
    if request.bin is not None and request.bin < 1:
        raise ConfigError(f"--bin {request.bin}: give a number of bases of at least 1")
    layers = trained.section.num_layers
    if request.layer is not None and not 0 <= request.layer <= layers:
        raise ConfigError(f"--layer {request.layer}: {trained.path} has {layers} layers: give 0, what the embedding "
                          f"gives, to {layers}")
    outcomes, unknown, rows, digest = Counter(dict.fromkeys(OUTCOMES, 0)), Counter[str](), 0, sha256()
    for sequence in request.inputs.read(trained.seq_len):
        outcomes[sequence.outcome] += 1
        unknown.update([sequence.contig] if sequence.outcome == "unknown_contig" else [])
        if sequence.outcome == "embedded":
            rows += rows_of(sequence.ids.size, request.bin)
        digest.update("\t".join(map(str, sequence[:6])).encode() + b"\n")
        digest.update(sequence.ids.tobytes())
    if not outcomes["embedded"]:
        counts = ", ".join(f"{count:,} {name}" for name, count in outcomes.items() if count) or "it has none"
        if isinstance(request.inputs, Regions) and unknown:
            counts += f"; {request.inputs.reference.against(unknown)}"
        raise ConfigError(f"{request.inputs.path}: none of its sequences can be embedded ({counts}): give regions of "
                          f"this reference, of at most {trained.seq_len:,} bases")
    return _Survey(dict(outcomes), rows, digest.hexdigest())


def _facts(trained: Trained, request: Request, found: _Survey, groups: Groups) -> dict[str, Any]:
    """Everything that decides what is in the file, and nothing that changes from call to call."""
    device = next(trained.model.parameters()).device.type
    return {"version": own_version(), "torch": library_version("torch"), "model": str(trained.path),
            "weights_sha256": trained.digest(), "precision": trained.precision, "device": device,
            "tokens_of_a_batch": TOKENS[device], "context": groups.context.size,
            "layer": "what the head reads" if request.layer is None else request.layer,
            "bin": "whole sequence" if request.bin is None else request.bin, "channels": trained.section.hidden_size,
            "longest": trained.seq_len, "sequences": request.inputs.path.name, "sequences_sha256": found.digest,
            "fasta": request.fasta, "assembly": request.inputs.assembly or "not said by the file",
            "counts": {name: count for name, count in found.outcomes.items() if count}, "rows": found.rows}


def _chunks(request: Request, longest: int) -> Iterator[list[Sequence]]:
    """All sequences, in order; what is not embedded stands in its chunk, too."""
    held: list[Sequence] = []
    bases = 0
    for sequence in request.inputs.read(longest):
        if held and (bases + sequence.ids.size > CHUNK_BASES or len(held) == CHUNK_SEQUENCES):
            yield held
            held, bases = [], 0
        held.append(sequence)
        bases += sequence.ids.size
    yield held


def _embed_chunks(trained: Trained, request: Request, found: _Survey, parts: Parts, groups: Groups) -> int:
    """Embed this rank's chunks that are not there yet; returns how many bases."""
    bar = Progress(TextColumn("sequences"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                   console=Console(file=sys.stderr), disable=groups.world.rank > 0 or not sys.stderr.isatty())
    bases = 0
    with bar:
        task = bar.add_task("", total=sum(found.outcomes.values()))
        for number, chunk in enumerate(_chunks(request, trained.seq_len)):
            if number % groups.data.size == groups.data.rank:
                chosen = [sequence.ids for sequence in chunk if sequence.outcome == "embedded"]
                if not parts.has(names([number]), groups):
                    rows = _embed_chunk(trained, request, chosen)
                    if groups.context.rank == 0:
                        parts.save(names([number]), rows=rows)
                    bases += sum(ids.size for ids in chosen)
            bar.advance(task, len(chunk))
    return bases


def _embed_chunk(trained: Trained, request: Request, chosen: list[np.ndarray]) -> np.ndarray:
    """float32 [rows, D]."""
    if not chosen:
        return np.zeros((0, trained.section.hidden_size), np.float32)
    try:
        return np.concatenate(embed(trained, chosen, request.bin, request.layer))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        longest = max(ids.size for ids in chosen)
        raise ConfigError(f"{request.inputs.path}: sequences of {longest:,} bases do not fit into the free memory: "
                          "free some, or share them among ranks with --context") from error


def _joined(trained: Trained, request: Request, found: _Survey,
            parts: Parts) -> Iterator[tuple[list[Sequence], np.ndarray]]:
    """Each chunk and its rows."""
    seen = 0
    for number, chunk in enumerate(_chunks(request, trained.seq_len)):
        rows = parts.need(names([number]))["rows"]
        wanted = sum(rows_of(sequence.ids.size, request.bin) for sequence in chunk if sequence.outcome == "embedded")
        seen += wanted
        if len(rows) != wanted or seen > found.rows:
            raise ConfigError(f"{request.inputs.path}: has changed while it was embedded: start again")
        yield chunk, rows
    if seen != found.rows:
        raise ConfigError(f"{request.inputs.path}: has changed while it was embedded: start again")


def _finish(trained: Trained, request: Request, found: _Survey, parts: Parts, facts: dict[str, Any]) -> None:
    """Join the parts, which go last."""
    index = (_index(chunk, start, request.bin) for chunk, start in _starts(request, trained.seq_len))
    write_whole(request.index, lambda aside: write_columns(aside, ".tsv", facts, index), ANOTHER)
    joined = _joined(trained, request, found, parts)
    if request.out.suffix == ".parquet":
        groups = (_columns(chunk, rows, request.bin) for chunk, rows in joined if len(rows))
        write_whole(request.out, lambda aside: write_columns(aside, ".parquet", facts, groups), ANOTHER)
    else:
        shape = (found.rows, trained.section.hidden_size)
        write_whole(request.out, lambda aside: _write_npy(aside, shape, (rows for _, rows in joined)), ANOTHER)
    parts.remove()


def _write_npy(path: Path, shape: tuple[int, int], pieces: Iterator[np.ndarray]) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for rows in pieces:
            file.write(rows.astype("<f4").tobytes())


def _starts(request: Request, longest: int) -> Iterator[tuple[list[Sequence], int]]:
    """Each chunk, and which row of the file is its first."""
    start = 0
    for chunk in _chunks(request, longest):
        yield chunk, start
        start += sum(rows_of(sequence.ids.size, request.bin) for sequence in chunk if sequence.outcome == "embedded")


def _index(chunk: list[Sequence], start: int, bin: int | None) -> Columns:
    """The rows of the index: those of a sequence are `first_row` to `first_row + rows - 1`."""
    rows = np.array([rows_of(each.ids.size, bin) if each.outcome == "embedded" else 0 for each in chunk], np.int64)
    return {"name": [each.name for each in chunk], "contig": [each.contig for each in chunk],
            "start": np.array([each.start for each in chunk]), "end": np.array([each.end for each in chunk]),
            "strand": [each.strand for each in chunk], "outcome": [each.outcome for each in chunk],
            "first_row": start + np.cumsum(rows) - rows, "rows": rows}


def _columns(chunk: list[Sequence], rows: np.ndarray, bin: int | None) -> Columns:
    """The rows of a parquet file: each with its sequence, and the first of its bases in that, as it is read."""
    chosen = [each for each in chunk if each.outcome == "embedded"]
    counts = [rows_of(each.ids.size, bin) for each in chosen]
    repeated = [each for each, count in zip(chosen, counts, strict=True) for _ in range(count)]
    offset = np.concatenate([np.arange(count, dtype=np.int64) for count in counts]) * (bin or 0)
    return {"name": [each.name for each in repeated], "contig": [each.contig for each in repeated],
            "start": np.array([each.start for each in repeated]), "end": np.array([each.end for each in repeated]),
            "strand": [each.strand for each in repeated], "offset": offset, "embedding": rows}
