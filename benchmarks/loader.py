"""Loader throughput on one core, against the pattern of the published HyenaDNA loader, and the size of the shards.

The published pattern is written from its description: a pyfaidx file opened once, a Python string per window, a
character tokenizer with a dictionary that gives a list of ids, a LongTensor of it, cloned shifted halves. It is the
bare pattern, without the tokenizer library's own overhead. Both sides end at int64 inputs and targets of the same
windows. A third reads a mixture of twenty sources, each of all of the shards, at weights of 1 to 20.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyfaidx
import torch

from benchmarks.timing import interleaved, ratio
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.mixture import Change
from hyena_dist.data.pool import Pool
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.splits import Splits
from hyena_dist.data.stream import TrainStream
from hyena_dist.data.tokenizer import TOKENS, UNK, split_window

REAL_SEQUENCE = Path(__file__).parents[1] / "shards/sample/human_chr2.fa.gz"
RANDOM_BASES = 6 << 20
BATCH_TOKENS = 1 << 15
"""Tokens of a micro-batch at short lengths; at longer ones a micro-batch is one window."""
SOURCES = 20
"""Of the mixture."""
_CHARACTERS = {token: index for index, token in enumerate(TOKENS)}


class LoaderRow(NamedTuple):
    """One measured length."""

    seq_len: int
    tokens_per_second: float
    published_tokens_per_second: float
    mixture_tokens_per_second: float
    ratio: float
    bytes_per_base: float
    """Shards and index over bases, the same in every row."""


def _genome(random_bases: int) -> dict[str, bytes]:
    """A real, soft-masked sequence and a random one."""
    (real,) = read_contigs([Source(REAL_SEQUENCE)])
    random = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", dtype=np.uint8), random_bases)
    return {"real": real.bases.tobytes(), "random": random.tobytes()}


def _write_fasta(path: Path, contigs: dict[str, bytes]) -> None:
    with path.open("wb") as file:
        for name, bases in contigs.items():
            lines = (bases[i : i + 60] for i in range(0, len(bases), 60))
            file.write(b">%s\n%s\n" % (name.encode(), b"\n".join(lines)))


def _published(fasta: pyfaidx.Fasta, contig: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one window, the published way."""
    sequence = str(fasta[contig][start:end])
    ids = torch.LongTensor([_CHARACTERS.get(character, UNK) for character in list(sequence)])
    return ids[:-1].clone(), ids[1:].clone()


def _reads(read: Callable[[], int]) -> Callable[[int], None]:
    """Repeat a function that reads some tokens and says how many, until there are as many as asked for."""
    def until(tokens: int) -> None:
        while tokens > 0:
            tokens -= read()
    return until


def _mixture(manifest: Manifest, seq_len: int) -> TrainStream:
    pools = [Pool(manifest, name=f"source{number}") for number in range(SOURCES)]
    return TrainStream(pools, seq_len=seq_len, seed=0, weights=[Change(0, tuple(range(1, SOURCES + 1)))])


def _ours(stream: TrainStream) -> Callable[[], int]:
    """Reads a batch of our loader."""
    batch_size = max(1, BATCH_TOKENS // stream.seq_len)
    batches = stream.batches(stream.start(), micro_batch_size=batch_size, global_batch_size=batch_size)
    return lambda: split_window(next(batches).ids)[0].numel()


def _published_reader(stream: TrainStream, fasta: pyfaidx.Fasta) -> Callable[[], int]:
    """Reads a window of the stream, in their order, by the published pattern."""

    def windows() -> Iterator[tuple[str, int, int]]:
        state = stream.start()
        while True:
            window = stream.order.window(state.epoch, state.index)
            interval = stream.intervals[window.interval]
            yield interval.contig, window.start, window.end
            state = stream.advance(state, 1)

    places = windows()

    return lambda: _published(fasta, *next(places))[0].numel()


def _check_same_tokens(manifest: Manifest, fasta: pyfaidx.Fasta, stream: TrainStream) -> None:
    for index in range(min(20, stream.order.epoch_size(0))):
        window = stream.order.window(0, index)
        contig = stream.intervals[window.interval].contig
        ours = torch.from_numpy(manifest.read(contig, window.start, window.end)).long()
        inputs, targets = _published(fasta, contig, window.start, window.end)
        assert torch.equal(ours[:-1], inputs), "inputs differ"
        assert torch.equal(ours[1:], targets), "targets differ"


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(*, seq_lens: tuple[int, ...] = (1024, 1 << 20), rounds: int = 5, tokens: int = 4 << 20,
        random_bases: int = RANDOM_BASES) -> list[LoaderRow]:
    """Measure each length: `rounds` turns of `tokens` for each loader, interleaved; medians."""
    rows = []
    with tempfile.TemporaryDirectory() as directory, _one_thread():
        contigs, path = _genome(random_bases), Path(directory) / "genome.fa"
        _write_fasta(path, contigs)
        manifest = build([Source(path)], Path(directory) / "shards", Splits())
        size = sum(file.stat().st_size for file in manifest.directory.iterdir())
        bytes_per_base = size / sum(shard.bases for shard in manifest.shards)
        _write_fasta(path, {name: bases.upper() for name, bases in contigs.items()})  # the published reads a as [UNK]
        with pyfaidx.Fasta(str(path)) as fasta:
            for seq_len in seq_lens:
                stream = TrainStream(manifest, seq_len=seq_len, seed=0)
                _check_same_tokens(manifest, fasta, stream)
                sides = {"ours": _ours(stream), "published": _published_reader(stream, fasta),
                         "mixture": _ours(_mixture(manifest, seq_len))}
                times = interleaved({name: _reads(read) for name, read in sides.items()}, lambda _: tokens,
                                    rounds=rounds, device=torch.device("cpu"))
                rows.append(LoaderRow(seq_len, *(tokens / times[name].seconds for name in sides),
                                      ratio(times["published"].wall, times["ours"].wall), bytes_per_base))
    return rows
