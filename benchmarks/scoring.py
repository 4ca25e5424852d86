"""What scoring variants costs beside the bare forward passes of the same windows, and how its memory grows with their
number.

The variants are all three single-base substitutions at each of many neighbouring places. Both sides take turns in the
same processes, one thread each, and their ranks begin each turn together. Memory is that of a fresh process for each
number of variants, in short windows, in which the bookkeeping of a variant is the most that it can be beside the
windows themselves.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.timing import timed
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.data.reference import read_reference
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.variants import Site, Variants
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.runtime.memory import peak_memory_bytes
from hyena_dist.tasks.score.read import TOKENS
from hyena_dist.tasks.score.variants import CHUNK, Request, score_variants
from hyena_dist.tasks.score.windows import batches

CPU = torch.device("cpu")
SHORT = 128
"""Bases of the windows in which memory is measured: long enough that the smallest part of a file fills a batch."""


class Size(NamedTuple):
    """A model in float32, and its windows."""

    length: int = 1024
    width: int = 128
    layers: int = 2


class Row(NamedTuple):
    """Of one side, over all ranks."""

    side: str
    variants: int
    windows: int
    """That the model reads, of both strands."""
    seconds: float
    """Of the clock, the median of the turns,"""
    cpu_seconds: float
    """and of all processors."""
    ratio: float
    """Of the processors' seconds to those of the forward passes, turn by turn; the median."""
    peak_MiB: float
    """Of a process; 0 where it was not measured."""


def trained_of(size: Size) -> Trained:
    """A model of a size with its initial values."""
    section = ModelSection(num_layers=size.layers, hidden_size=size.width, max_seq_len=size.length)
    return Trained(section, HyenaModel(hyena_config(section), seed=0).eval(), Path("initial"), size.length)


def write_inputs(directory: Path, variants: int, size: Size) -> tuple[np.ndarray, list[Site]]:
    """Write reference.fa and variants.vcf, and return the reference's token ids and the variants as they are scored."""
    places = -(-variants // 3)
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), places + 2 * size.length))
    (directory / "reference.fa").write_text(f">1\n{bases}\n", encoding="utf-8")
    rows = [(size.length + place, alt) for place in range(places) for alt in "ACGT"
            if alt != bases[size.length + place]][:variants]
    with (directory / "variants.vcf").open("w", encoding="utf-8") as file:
        file.write("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        file.writelines(f"1\t{at + 1}\t.\t{bases[at]}\t{alt}\t.\t.\t.\n" for at, alt in rows)
    ids = encode(bases)
    return ids, [Site(0, ids.size, at, 1, encode(alt)) for at, alt in rows]


def run(size: Size, *, variants: int, ranks: int, rounds: int, memory_of: Iterable[int] = ()) -> list[Row]:
    """Measure both sides, and then the memory of each number of variants."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_time_rank, (size, variants, ranks, rounds, directory), nprocs=ranks)
        found = [torch.load(Path(directory, f"result.{rank}"), weights_only=False) for rank in range(ranks)]
    windows = sum(count for count, _ in found)
    took = {side: [(max(rank[side][turn][0] for _, rank in found), sum(rank[side][turn][1] for _, rank in found))
                    for turn in range(rounds)] for side in found[0][1]}
    bare = [cpu for _, cpu in took["forward passes"]]
    rows = [Row(side, variants, windows, statistics.median(wall for wall, _ in each),
                statistics.median(cpu for _, cpu in each),
                statistics.median(cpu / other for (_, cpu), other in zip(each, bare, strict=True)), 0.0)
            for side, each in took.items()]
    return rows + [memory(count) for count in memory_of]


def turns(size: Size, variants: int, groups: Groups,
           directory: Path) -> tuple[int, dict[str, Callable[[int], object]]]:
    """How many windows are this rank's, and both sides, each a function of the turn's number."""
    ids, sites = write_inputs(directory, variants, size)
    trained, world = trained_of(size), groups.world
    step = CHUNK // 3 * 3  # the three alleles of a place share a reference window
    chunks = [sites[start : start + step] for start in range(0, len(sites), step)]
    of_batch = max(1, TOKENS["cpu"] // size.length)
    windows = [torch.from_numpy(batch.ids).long() for chunk in chunks
               for batch in batches(chunk, ids, size.length, of_batch)][world.rank :: world.size]

    @torch.no_grad()
    def forward_passes(_turn: int) -> None:
        for batch in windows:
            trained.model(batch)

    def scoring(turn: int) -> None:
        request = Request(Variants(directory / "variants.vcf", is_vcf=True), read_reference(directory / "reference.fa"),
                          directory.parent / f"scores-{turn}.tsv", size.length, "reference.fa")
        score_variants(trained, request, groups)

    return sum(map(len, windows)), {"forward passes": forward_passes, "score variants": scoring}


def _time_rank(rank: int, size: Size, variants: int, ranks: int, rounds: int, shared: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{shared}/store", rank=rank, world_size=ranks)
    directory = Path(shared, f"rank-{rank}")
    directory.mkdir()
    windows, sides = turns(size, variants, init_groups(), directory)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            dist.barrier()
            seconds = timed(partial(work, turn), CPU)
            if turn:  # the first is the warm-up
                times[side].append(seconds)
    torch.save((windows, times), Path(shared, f"result.{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def memory(variants: int, work: Callable[[int, int, str], None] | None = None) -> Row:
    """Of scoring so many in a fresh process.

    Args:
        work: what that process does, of the number 0, the number of variants and the directory of its inputs, in which
            it leaves its result (default: `score_and_measure`).
    """
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), variants, Size(SHORT))  # here: what it holds is no memory of scoring
        mp.spawn(work or score_and_measure, (variants, directory), nprocs=1)
        windows, seconds, cpu, peak = torch.load(Path(directory, "result"), weights_only=False)
    return Row(f"memory, windows of {SHORT}", variants, windows, seconds, cpu, 0.0, peak / 2**20)


def score_and_measure(_rank: int, variants: int, shared: str) -> None:
    """Score the variants in a directory, and leave there what it took."""
    torch.set_num_threads(1)
    size, directory = Size(SHORT, 16, 1), Path(shared)
    request = Request(Variants(directory / "variants.vcf", is_vcf=True), read_reference(directory / "reference.fa"),
                      directory / "scores.tsv", size.length, "reference.fa")
    seconds, cpu = timed(lambda: score_variants(trained_of(size), request, Groups.single()), CPU)
    places = -(-variants // 3)
    torch.save((2 * (variants + places), seconds, cpu, peak_memory_bytes(CPU)), directory / "result")
