"""8x256 at 1,048,576 tokens in bf16, by backend and by what is computed again in the backward pass."""

from functools import partial

import torch

from benchmarks.gpu.measure import Size, cost, forget_peak, kernels, waits
from benchmarks.gpu.task import Task

SIZES = (Size(8, 256, 1 << 20), Size(8, 256, 1 << 20, backend="triton"),
         Size(8, 256, 1 << 20, backend="triton", checkpointing="selective"),
         Size(8, 256, 1 << 20, checkpointing="selective"), Size(8, 256, 1 << 20, checkpointing="full"))
TINY = (Size(2, 16, 512), Size(2, 16, 512, checkpointing="full"))
SHOWN_KERNELS = 8
LEAST_SECONDS = 12.0
"""For another size."""


def run(task: Task) -> None:
    for number, size in enumerate(TINY if task.tiny else SIZES):
        if task.left() < LEAST_SECONDS and number:
            task.note(f"{size}: no time left")
            continue
        task.attempt(str(size), partial(one, task, size, profile=not number))
        forget_peak()


def one(task: Task, size: Size, *, profile: bool) -> None:
    """Note the cost of a step of this size, where it waits, and with `profile` its kernels."""
    try:
        found, step = cost(size)
    except torch.OutOfMemoryError as error:
        task.note(f"{size}: does not fit into the device's memory", ok=False, error=str(error)[:300])
        return
    waiting = waits(step)
    task.note(f"{size}: {found.text()}; waits {waiting or 'none'}", size=str(size), cost=found.numbers(), waits=waiting,
              ok=found.last_loss == found.last_loss)
    if profile:
        table = kernels(step)
        task.note("  " + table.text(), launches=table.launches, busy=table.busy, span=table.span,
                  kernels=table.by_name[:40])
        for row in table.rows(SHOWN_KERNELS):
            task.note("  " + row)
