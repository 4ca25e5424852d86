"""The rates of this machine, measured in some seconds: elementwise work, matrix products, FFTs, calls and sending."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.costs.devices import CPU, ESTIMATED, GPUS, MEASURED, Gpu
from hyena_dist.costs.seconds import Rates, gpu_rates, uses_kernels
from hyena_dist.costs.utilisation import copy_bandwidth
from hyena_dist.model.config import COMPUTE_DTYPES
from hyena_dist.model.kinds.formulas import FP32, fft_flops
from hyena_dist.ops.chunking import CHUNK_ELEMENTS, LEAST_TOKENS

SECONDS = 0.4
"""Of each measurement; its fastest turn counts, because others may wait for neighbours."""
MESSAGE = 2**22
"""Bytes that the local processes send each other at a time."""
TURNS = 8

STREAM = 2**24
"""Elements of a tensor that no core's cache holds."""
CALLS = 1000

CPU_PRODUCTS, CPU_ELEMENTS, CPU_CALLS = 0.85, 7.5, 10_800
"""How many times as long as at the rates that are measured here a step's products and its elementwise work take on a
CPU, and how many calls of an operation on a few elements take as long as the host's own work for a layer. A part goes
through its elements many times, in the cache or not, and computes sines and exponentials of some. Fitted to eight
sizes from 2x32 to 2x256, at 1,024 to 32,768 tokens in float32, which they give within 11 %. Additions in the cache
alone do not tell CPUs apart: constants of one planned a step on another at 0.6 to 0.8 of its time."""


def this_machine(*, may_be_a_cpu: bool) -> Gpu:
    """The GPU here, with its own memory; the CPU, where it may be one and there is no GPU.

    Raises:
        ConfigError: there is no GPU, or one that the table does not have.
    """
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        plain = name.lower().replace(" ", "")
        known = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in plain]
        if not known:
            raise ConfigError(f"--gpu is missing, and {name} is not in the table: use one of {', '.join(GPUS)}")
        nearest = min(known, key=lambda gpu: abs(gpu.memory - memory))
        return Gpu(**{**vars(nearest), "memory": float(memory)})
    if not may_be_a_cpu:
        raise ConfigError(f"--gpu is missing, and this machine has none: use one of {', '.join(GPUS)}, or --probe to "
                          "plan for this machine's CPU")
    import psutil
    return Gpu(CPU, float(psutil.virtual_memory().total), 1e10, 1e11, 1e11, 1e9, 1e9)


def probe(config: Config, gpu: Gpu, *, several: bool) -> Rates:
    """Measure here what a step of this model is made of. On a CPU two processes send each other something, if there are
    to be several ranks; links between GPUs, and between nodes, are the table's.

    Args:
        gpu: the entry of this machine, for what is not measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = dict.fromkeys(("product", "elements"), MEASURED)
    if device.type == "cuda":
        table = gpu_rates(gpu, config.train.precision, kernels=uses_kernels(config, gpu))
        return Rates(copy=copy_bandwidth(device), product=_product_rate(config, device),
                     attention=table.attention, fft=None, inside=table.inside,
                     between=table.between, layer=table.layer, step=table.step, slower=table.slower, sources=sources)
    inside, sent = (_send_rate(), MEASURED) if several else (gpu.node_link, ESTIMATED)
    product = _product_rate(config, device) / CPU_PRODUCTS
    return Rates(copy=_elementwise_rate() / CPU_ELEMENTS, product=product, attention=product,
                 fft=_fft_rate(config, device), inside=inside, between=inside, layer=CPU_CALLS * _call_seconds(),
                 sources=sources | {"fft": MEASURED, "host": MEASURED, "inside": sent, "between": ESTIMATED})


def _least_seconds(turn: Callable[[], object], device: torch.device) -> float:
    """Of one turn."""
    found: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < until:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        turn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _elementwise_rate() -> float:
    """Bytes per second, read and written, of additions that go through a CPU's memory."""
    x, y = torch.ones(STREAM), torch.ones(STREAM)
    return 3 * FP32 * STREAM / _least_seconds(lambda: torch.add(x, y, out=y), x.device)


def _call_seconds() -> float:
    """Of an operation on a few elements."""
    x = torch.ones(8)

    def turn() -> None:
        for _ in range(CALLS):
            torch.add(x, x)
    return _least_seconds(turn, x.device) / CALLS


def _product_rate(config: Config, device: torch.device) -> float:
    """Operations per second of a product of this width and precision, by as many tokens as a chunk has at least."""
    width, inner = config.model.hidden_size, config.model.inner_size
    tokens = LEAST_TOKENS if device.type == "cpu" else 2**17
    dtype = COMPUTE_DTYPES[config.train.precision] or torch.float32
    x, w = torch.ones(tokens, width, dtype=dtype, device=device), torch.ones(width, inner, dtype=dtype, device=device)
    return 2.0 * tokens * width * inner / _least_seconds(lambda: x.mm(w), device)


def _fft_rate(config: Config, device: torch.device) -> float:
    """Operations per second of real FFTs of twice the length, there and back, as a padded convolution has them."""
    size = 2 * config.data.seq_len
    x = torch.ones(max(1, CHUNK_ELEMENTS * torch.get_num_threads() // size), size, device=device)
    seconds = _least_seconds(lambda: torch.fft.irfft(torch.fft.rfft(x), n=size), device)
    return 2 * len(x) * fft_flops(size) / 2 / seconds


def _send_rate() -> float:
    """Bytes per second that a process sends another one here, by gloo's all-to-all and all-reduce in turn."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_send, args=(directory,), nprocs=2)
        return float(Path(directory, "rate").read_text("utf-8"))


def _send(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    x, y = torch.ones(MESSAGE // FP32), torch.ones(MESSAGE // FP32)
    seconds = []
    for _ in range(TURNS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_to_all_single(y, x)
        dist.all_reduce(x)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        Path(directory, "rate").write_text(str(1.5 * MESSAGE / statistics.median(seconds[1:])), encoding="utf-8")
    dist.destroy_process_group()
