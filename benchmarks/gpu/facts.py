"""What the device can do at most, whether everything imports, and whether one NCCL rank works."""

import importlib
import os
import time
from datetime import timedelta
from functools import partial

from benchmarks.gpu.task import Task, device, median_seconds

MODULES = ("hyena_dist.model.model", "hyena_dist.train.trainer", "hyena_dist.engine.fsdp",
           "hyena_dist.engine.deepspeed", "hyena_dist.convert", "hyena_dist.tasks.evaluate", "benchmarks.subjects",
           "hyena_dist.model.megatron")
LAUNCHES = 2000


def run(task: Task) -> None:
    task.attempt("ceilings", lambda: _ceilings(task))
    task.attempt("imports", lambda: _imports(task))
    task.attempt("one rank", lambda: _one_rank(task))


def _ceilings(task: Task) -> None:
    """Copy and matrix product at their fastest, and the time of a launch from Python."""
    import torch
    where = device()
    size = 1 << (22 if task.tiny else 32)  # far beyond a cache
    source = torch.ones(size // 4, device=where)
    target = torch.empty_like(source)
    copy = 2 * size / median_seconds(lambda: target.copy_(source))
    source = target = torch.empty(0)  # the room is needed
    n = 256 if task.tiny else 8192
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=where).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = 2 * n**3 / median_seconds(partial(torch.matmul, a, b))
    x = torch.ones(1024, device=where)

    def launches() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    launch = median_seconds(launches, rounds=3) / LAUNCHES
    task.note(f"copy {copy / 1e12:.2f} TB/s, product bf16 {products['bfloat16'] / 1e12:.0f}, float32 "
              f"{products['float32'] / 1e12:.1f} TFLOP/s, a small kernel every {launch * 1e6:.1f} us from Python",
              copy_bytes_per_second=copy, flops=products, launch_seconds=launch)


def _imports(task: Task) -> None:
    seconds = {}
    for name in MODULES:
        started = time.monotonic()
        importlib.import_module(name)
        seconds[name] = round(time.monotonic() - started, 2)
    shm = os.statvfs("/dev/shm")
    task.note(f"imports: {sum(seconds.values()):.1f} s; /dev/shm {shm.f_blocks * shm.f_frsize >> 20:,} MiB", ok=True,
              imports=seconds)


def _one_rank(task: Task) -> None:
    """The process group that a run on one device has, and a gloo group beside it."""
    import torch
    import torch.distributed as dist

    from hyena_dist.parallel.groups import init_groups
    from hyena_dist.runtime.launch import init_distributed
    where = init_distributed(timedelta(seconds=40))
    groups = init_groups()
    one, found = torch.ones(4, device=where), torch.empty(4, device=where)
    dist.all_reduce(one, group=groups.world.group)
    dist.all_to_all_single(found, one, async_op=True).wait()
    dist.all_reduce(torch.ones(1), group=dist.new_group([0], backend="gloo"))
    dist.barrier()
    task.note(f"one rank over {dist.get_backend()}: all_reduce, all_to_all, barrier, gloo beside it",
              ok=bool((found == 1).all()))
