"""Pretraining on NCCL ranks: two that share one GPU, and one for every GPU where there are several. gloo on a CPU."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.runs import Run, build_shards, pretrain, report
from benchmarks.gpu.task import Task

SHORT = ("train.steps=6", "train.eval_every=0", "train.save_every=0")
"""Two ranks on one GPU talk through sockets: a step of tensor ranks at ZeRO-3 takes more than a second."""
CASES: dict[str, tuple[str, ...]] = {
    "context": ("parallel.context=2", "parallel.overlap_groups=2"),
    "data": ("engine.zero_stage=1",),
    "fsdp distributed_fft": ("engine.name=fsdp", "parallel.context=2", "parallel.context_method=distributed_fft"),
    "tensor sequence zero3": ("engine.zero_stage=3", "parallel.tensor=2", "parallel.sequence=true"),
}
MOST_GPUS = 8


def shared_gpu(ranks: int) -> list[dict[str, str]]:
    """Environments of ranks on the first GPU. NCCL refuses two ranks of one host on a device, so each says that it is
    another host; data then goes through sockets on the loopback interface."""
    return [{"CUDA_VISIBLE_DEVICES": first_gpu(), "NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo",
             "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"} for rank in range(ranks)]


def first_gpu() -> str:
    """Of those that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def run(task: Task) -> None:
    shards = build_shards(task)
    chosen = dict(list(CASES.items())[:1]) if task.tiny else CASES
    ranks: Sequence[dict[str, str]] = [{}, {}] if task.tiny else shared_gpu(2)
    with ThreadPoolExecutor(1 if task.tiny else len(chosen) + 2) as pool:
        single = pool.submit(pretrain, task, "one rank", shards, SHORT)
        shared = [pool.submit(pretrain, task, name, shards, [*SHORT, *keys], ranks) for name, keys in chosen.items()]
        several = pool.submit(_every_gpu, task, shards)
        one = single.result()
        report(task, one, None)
        for future in shared:
            report(task, future.result(), one)
        for done in several.result():
            report(task, done, one)


def _every_gpu(task: Task, shards: Path) -> list[Run]:
    """Runs over all GPUs of this machine, one rank each; none where there is one."""
    import torch
    gpus = min(MOST_GPUS, 1 << torch.cuda.device_count().bit_length() >> 1)  # a power of 2: it divides the batch
    if gpus < 2:
        return []
    ranks: list[dict[str, str]] = [{}] * gpus
    keys = {"data": ("train.micro_batch_size=1",), "context": (f"parallel.context={gpus}",)}
    return [pretrain(task, f"{gpus} GPUs {name}", shards, [*SHORT, *extra], ranks) for name, extra in keys.items()]
