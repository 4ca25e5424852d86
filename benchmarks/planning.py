"""A plan's seconds against real steps on this machine's CPU, by the rates that its probe measures in the same process.

Both are of one thread, and a step's seconds are those of the processor, which a neighbour on the machine hardly moves.
"""

import time
from typing import NamedTuple

import torch

from benchmarks.step import new_model
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.engines import Layout
from hyena_dist.costs.probe import probe, this_machine
from hyena_dist.costs.seconds import compute_seconds
from hyena_dist.model.loss import token_loss

CPU = torch.device("cpu")
SIZES = ((2, 48, 2048, 2), (2, 64, 16384, 1), (3, 96, 4096, 1), (2, 128, 1024, 2), (4, 192, 1024, 1), (2, 256, 2048, 1))
"""Layers, width, tokens, windows: others than those to which the constants of `costs.probe` were fitted."""


class Row(NamedTuple):
    """Of one size."""

    side: str
    seconds: float
    """Of a step, of the fastest turn."""
    planned: float
    ratio: float
    """Planned over measured."""


def run(*, rounds: int = 3) -> list[Row]:
    """Measure each size, after its own probe; the first turn of a step does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(*size, rounds=rounds) for size in SIZES]
    finally:
        torch.set_num_threads(threads)


def _row(layers: int, width: int, length: int, batch: int, *, rounds: int) -> Row:
    section = ModelSection(num_layers=layers, hidden_size=width, max_seq_len=length, embed_dropout=0.0)
    config = Config(model=section, data=DataSection(shards="unused", seq_len=length),
                    train=TrainSection(run_dir="unused", micro_batch_size=batch, global_batch_size=batch))
    rates = probe(config, this_machine(may_be_a_cpu=True), several=False)
    planned = sum(compute_seconds(config, Layout.of(config, 1), rates).values())
    model, ids = new_model(section, CPU), torch.randint(7, 11, (batch, length))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = []
    for _ in range(rounds + 1):
        started = time.process_time()
        loss, count = token_loss(model(ids), ids)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.process_time() - started)
    return Row(f"{layers}x{width} at {length:,} x {batch}", min(found[1:]), planned, planned / min(found[1:]))
