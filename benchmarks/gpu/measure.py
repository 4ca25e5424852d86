"""What a training step costs on a device: its time, its memory, its launches, and where the host waits for it."""

import collections
import gc
import importlib.util
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.task import device, median_seconds
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.ops import OpsSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.flops import mfu, peak_flops
from hyena_dist.costs.memory import training_memory
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.optimizer import build_optimizer

Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """A model and its micro-batch."""

    layers: int
    width: int
    length: int
    batch: int = 1
    checkpointing: str = "none"
    precision: str = "bf16"
    pattern: str = "H"
    heads: int = 4
    backend: str = "auto"

    def __str__(self) -> str:
        pattern, backend = ("" if self.pattern == "H" else f" {self.pattern}",
                            "" if self.backend == "auto" else f", {self.backend}")
        return (f"{self.layers}x{self.width}{pattern} at {self.length:,} x {self.batch}, {self.precision}, "
                f"{self.checkpointing}{backend}")

    def section(self) -> ModelSection:
        return ModelSection(num_layers=self.layers, hidden_size=self.width, max_seq_len=self.length, embed_dropout=0.0,
                            layer_pattern=self.pattern, num_attention_heads=self.heads)


@dataclass(frozen=True)
class Cost:
    """Of a step of one size."""

    seconds: float
    first_seconds: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    reserved_bytes: int
    formula_bytes: float
    first_loss: float
    last_loss: float

    def text(self) -> str:
        memory = (f", peak {self.peak_bytes / 2**30:.2f} GiB = {self.peak_bytes / self.formula_bytes:.2f} of the "
                  f"formula, {self.reserved_bytes / 2**30:.2f} reserved" if self.peak_bytes else "")
        return (f"{self.seconds * 1e3:,.1f} ms, {self.tokens_per_second:,.0f} tokens/s, mfu {self.mfu:.1%}{memory}, "
                f"loss {self.first_loss:.3f} to {self.last_loss:.3f}")

    def numbers(self) -> dict[str, Any]:
        return asdict(self)


def training_step(size: Size) -> tuple[Step, list[torch.Tensor], HyenaModel]:
    """(a whole step on random bases: forward, loss, backward, clipping, AdamW; the losses of its calls; the model)"""
    where = device()
    train = TrainSection(precision=size.precision, activation_checkpointing=size.checkpointing)
    config = Config(model=size.section(), train=train, ops=OpsSection(backend=size.backend))
    model = build_model(config, Groups.single()).to(where).train()
    optimizer = build_optimizer(model, model.placement(), config.optim)
    ids = torch.randint(7, 11, (size.batch, size.length + 1), device=where)
    windows, losses = torch.arange(size.batch, device=where), []

    def step() -> None:
        total, count = token_loss(model(ids[:, :-1], DropoutKey(0, 0, windows)), ids[:, 1:])
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    return step, losses, model


def cost(size: Size, *, rounds: int = 5, at_most: float = 10.0) -> tuple[Cost, Step]:
    """Time a step of this size; the step comes back for what else is to be asked of it."""
    where = device()
    forget_peak()
    step, losses, _ = training_step(size)
    started = time.monotonic()
    step()
    synchronize()
    first = time.monotonic() - started
    seconds = median_seconds(step, rounds=rounds, warm=1, at_most=at_most)
    rate = size.length * size.batch / seconds
    peak = peak_flops(torch.cuda.get_device_name(), size.precision) if where.type == "cuda" else None
    used = (mfu(size.section(), size.length, tokens_per_second=rate, peak=peak, micro_batch_size=size.batch)
            if peak else 0.0)
    formula = training_memory(size.section(), size.length, size.batch, precision=size.precision,
                              activation_checkpointing=size.checkpointing, device=where.type,
                              backend=size.backend).total
    allocated, reserved = peak_bytes()
    return Cost(seconds, first, rate, used, allocated, reserved, formula, float(losses[0]), float(losses[-1])), step


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def forget_peak() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> tuple[int, int]:
    """(allocated, reserved) since `forget_peak`; 0 on a CPU."""
    if device().type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def waits(work: Step) -> dict[str, int]:
    """Where the host waits for the device during a call, by function, as torch's own mode sees it."""
    with counted_waits() as found:
        work()
    return dict(found)


@contextmanager
def counted_waits() -> Iterator[collections.Counter[str]]:
    """While entered, on CUDA, count where the host waits for the device, by `place`."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            found[place()] += 1

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if device().type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield found


def place() -> str:
    """The innermost function under way that is ours or DeepSpeed's: `hyena_dist/train/trainer.py:_settle`."""
    for frame in reversed(traceback.extract_stack()):
        for parent, package in _packages():
            if frame.filename.startswith(f"{parent}/{package}/"):
                return f"{frame.filename.removeprefix(f'{parent}/')}:{frame.name}"
    return "elsewhere"


@cache
def _packages() -> list[tuple[str, str]]:
    """Where each stands, and its name."""
    specs = filter(None, map(importlib.util.find_spec, ("hyena_dist", "deepspeed")))
    return [(directory.rpartition("/")[0], spec.name) for spec in specs
            for directory in spec.submodule_search_locations or ()]


@dataclass(frozen=True)
class Kernels:
    """What ran on the device during a call."""

    launches: int
    busy: float
    """Seconds in which a kernel ran."""
    span: float
    """Seconds from the first kernel's start to the last one's end."""
    by_name: list[tuple[str, int, float]]
    """(name, launches, seconds), the longest first."""

    def rows(self, most: int) -> list[str]:
        return [f"{seconds / max(self.busy, 1e-9):6.1%} {seconds * 1e3:9.2f} ms {number:6,} x {name[:120]}"
                for name, number, seconds in self.by_name[:most]]

    def text(self) -> str:
        return (f"{self.launches:,} launches, busy {self.busy * 1e3:,.1f} of {self.span * 1e3:,.1f} ms = "
                f"{self.busy / max(self.span, 1e-9):.0%}")


def kernels(work: Step) -> Kernels:
    """Trace a call; on a CPU its operators stand for kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    on_gpu = device().type == "cuda"
    seconds: collections.Counter[str] = collections.Counter()
    number: collections.Counter[str] = collections.Counter()
    first, last = float("inf"), 0.0
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        synchronize()
    for event in profiler.profiler.kineto_results.events():
        if not on_gpu or event.device_type() == DeviceType.CUDA:
            seconds[event.name()] += event.duration_ns()
            number[event.name()] += 1
            first, last = min(first, event.start_ns()), max(last, event.start_ns() + event.duration_ns())
    table = [(name, number[name], ns / 1e9) for name, ns in seconds.most_common()]
    return Kernels(sum(number.values()), sum(seconds.values()) / 1e9, max(0.0, last - first) / 1e9, table)
