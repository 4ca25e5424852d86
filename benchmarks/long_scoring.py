"""What scoring very many variants costs: once, by several ranks, in a directory in which it goes on after a kill.

The seconds of all calls are added up, those of a killed one to within a few. The bare forward passes are those of a
sample, some batches of windows at even distances, which each rank reads when all variants are scored; their seconds are
scaled to all windows.
"""

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.scoring import CPU, Row, Size, trained_of, write_inputs
from benchmarks.timing import timed
from hyena_dist.data.reference import read_reference
from hyena_dist.data.variants import Variants
from hyena_dist.parallel.groups import init_groups
from hyena_dist.runtime.memory import peak_memory_bytes
from hyena_dist.tasks.score.read import TOKENS
from hyena_dist.tasks.score.variants import CHUNK, Request, score_variants
from hyena_dist.tasks.score.windows import batches

SAMPLE = 40
"""Batches of the sample, over all ranks."""
_EVERY = 5.0
"""Seconds between two notes of a call's time: what a kill can hide of it."""


def problem(size: Size, variants: int, directory: Path) -> str | None:
    """Why these cannot be scored in this directory; None: they can."""
    begun = directory / "asked.json"
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != _asked(size, variants):
        return (f"{directory} was begun with {begun.read_text(encoding='utf-8')}: go on with these numbers, or name "
                "another directory")
    return None


def _asked(size: Size, variants: int) -> dict[str, int]:
    return {**size._asdict(), "variants": variants}


def run(size: Size, *, variants: int, ranks: int, directory: Path) -> list[Row]:
    """Score in a directory, or go on there."""
    directory.mkdir(parents=True, exist_ok=True)
    write_inputs(directory, variants, size)  # the same each time
    (directory / "asked.json").write_text(json.dumps(_asked(size, variants)), encoding="utf-8")
    (directory / "store").unlink(missing_ok=True)
    mp.spawn(_rank, (size, variants, ranks, str(directory)), nprocs=ranks)
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("call-*.json")]
    calls = {note["call"]: [other for other in notes if other["call"] == note["call"]] for note in notes}
    seconds = sum(max(note["seconds"] for note in of_call) for of_call in calls.values())
    cpu, peak = sum(note["cpu"] for note in notes), max(note["peak"] for note in notes)
    sample = [json.loads((directory / f"sample-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    windows = 2 * (variants + -(-variants // 3))
    read, bare = sum(each["windows"] for each in sample), sum(each["cpu"] for each in sample)
    wall = max(each["seconds"] for each in sample)
    scale = windows / read
    return [Row(f"forward passes of {read:,} windows, scaled", variants, windows, wall * scale, bare * scale, 1.0, 0.0),
            Row(f"score variants, in {len(calls)} calls", variants, windows, seconds, cpu, cpu / (bare * scale),
                peak / 2**20)]


class _Clock(threading.Thread):
    """Notes how long this rank has worked in this call, every few seconds."""

    def __init__(self, path: Path, call: str) -> None:
        super().__init__(daemon=True)
        self._path, self._call, self._end = path, call, threading.Event()
        self._start, self._cpu = time.monotonic(), time.process_time()

    def run(self) -> None:
        while not self._end.wait(_EVERY):
            self.note()

    def note(self) -> None:
        found: dict[str, Any] = {"call": self._call, "seconds": time.monotonic() - self._start,
                                 "cpu": time.process_time() - self._cpu, "peak": peak_memory_bytes(CPU)}
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(self._path)

    def end(self) -> None:
        self._end.set()
        self.join()
        self.note()


def _rank(rank: int, size: Size, variants: int, ranks: int, shared: str) -> None:
    torch.set_num_threads(1)
    directory = Path(shared)
    dist.init_process_group("gloo", init_method=f"file://{shared}/store", rank=rank, world_size=ranks)
    groups, trained, out = init_groups(), trained_of(size), directory / "scores.tsv"
    call = [str(time.time_ns())]
    dist.broadcast_object_list(call)
    if not out.exists() or out.with_name(f"{out.name}.parts").exists():
        clock = _Clock(directory / f"call-{call[0]}-{rank}.json", call[0])
        clock.start()
        score_variants(trained, Request(Variants(directory / "variants.vcf", is_vcf=True),
                                        read_reference(directory / "reference.fa"), out, size.length, "reference.fa"),
                       groups)
        clock.end()
    dist.barrier()
    windows, passes = _sample(directory, size, variants, rank, ranks)
    passes[0]()  # the warm-up
    seconds, cpu = timed(lambda: [read() for read in passes], CPU)
    (directory / f"sample-{rank}.json").write_text(json.dumps({"windows": windows, "seconds": seconds, "cpu": cpu}),
                                                   encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _sample(directory: Path, size: Size, variants: int, rank: int, ranks: int) -> tuple[int, list[partial[Any]]]:
    """How many windows are this rank's of the sample, and a forward pass of each of its batches."""
    work = directory / f"rank-{rank}"
    work.mkdir(exist_ok=True)
    ids, sites = write_inputs(work, variants, size)
    step = CHUNK // 3 * 3  # the three alleles of a place share a reference window
    chunks = list(range(0, len(sites), step))
    chosen = [chunks[number * len(chunks) // SAMPLE] for number in range(min(SAMPLE, len(chunks)))][rank::ranks]
    trained, of_batch = trained_of(size), max(1, TOKENS["cpu"] // size.length)
    found = [torch.from_numpy(next(iter(batches(sites[start : start + step], ids, size.length, of_batch))).ids).long()
             for start in chosen or chunks[:1]]
    return sum(map(len, found)), [partial(torch.no_grad()(trained.model), batch) for batch in found]
