"""Every way to lay a run out over GPUs: what each needs, sends and takes, and which are the fastest that fit.

What is legal is for `config.checks` to say: each candidate is a whole configuration, and the checks are asked.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.warmup import stages
from hyena_dist.costs.devices import CONTEXT_BYTES, CPU, FRAGMENTS, NCCL_BYTES, Gpu
from hyena_dist.costs.engines import Layout
from hyena_dist.costs.memory import TrainingMemory, run_memory
from hyena_dist.costs.seconds import Rates, Work, compute_seconds, gpu_rates, send_seconds, step_work, uses_kernels
from hyena_dist.costs.traffic import Traffic, links, step_traffic
from hyena_dist.model.kinds import is_legal

ENGINES = (*(EngineSection(zero_stage=stage) for stage in (1, 0, 2, 3)), EngineSection(name="fsdp"))
"""The simpler one first, for what is as fast."""
RECOMPUTE = ("none", "selective", "block", "full")
METHODS = ("all_to_all", "distributed_fft")
LENGTH_STEP = 1024
"""Longest lengths are multiples of it."""


@dataclass(frozen=True)
class Machines:
    """What the run is on."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    rates: Rates | None = None
    """Measured ones; None: by the table."""

    def rates_of(self, config: Config) -> Rates:
        return self.rates or gpu_rates(self.gpu, config.train.precision, kernels=uses_kernels(config, self.gpu))


@dataclass(frozen=True)
class Plan:
    """One layout of a run, and what it costs a rank. Bytes sent are exact; all else is estimated."""

    config: Config
    machines: Machines

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config, self.machines.gpus)

    @cached_property
    def memory(self) -> TrainingMemory:
        """Of the tensors."""
        return run_memory(self.config, world_size=self.machines.gpus, device="cpu" if self._on_cpu else "cuda")

    @property
    def _on_cpu(self) -> bool:
        return self.machines.gpu.name == CPU

    @property
    def categories(self) -> dict[str, float]:
        """Bytes by what they are, at the moment of the step that needs the most; they add up to `bytes`."""
        memory, held = self.memory, self.memory.held
        late, loss = memory.moment == "update", memory.moment == "loss"
        working = 0.0 if late else memory.loss if loss else memory.blocks
        exchanged, plans = (0.0, 0.0) if late or loss else (memory.exchanged, memory.plans)
        found = {"weights": held.weights, "gradients": held.gradients if late else held.waiting,
                 "optimizer": held.optimizer, "engine's copies": held.copies, "buckets": held.buckets if late else 0.0,
                 "saved activations": 0.0 if late else memory.saved, "workspace": working - exchanged - plans,
                 "exchange buffers": exchanged, "cuFFT": plans}
        groups = sum(size > 1 for size in (self.layout.tensor, self.layout.context, self.layout.shards))
        if not self._on_cpu:
            found |= {"CUDA context": CONTEXT_BYTES, "NCCL": groups * NCCL_BYTES}
        return {**found, "allocator's gaps": FRAGMENTS * memory.total}

    @cached_property
    def bytes(self) -> float:
        """That a rank needs of its GPU."""
        return sum(self.categories.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.machines.gpu.memory

    @cached_property
    def sent(self) -> Traffic:
        """Bytes that a rank sends in a step, by axis and kind of collective."""
        return step_traffic(self.config, self.machines.gpus)

    @cached_property
    def links(self) -> dict[str, float]:
        """The same inside a node and between nodes."""
        return links(self.sent, self.config, self.machines.gpus, self.machines.gpus_per_node)

    @property
    def work(self) -> Work:
        return step_work(self.config, self.layout)

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by what takes them."""
        rates = self.machines.rates_of(self.config)
        return compute_seconds(self.config, self.layout, rates) | send_seconds(self.links, rates)

    @property
    def seconds(self) -> float:
        """Of an optimizer step at data.seq_len."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        """Of the run, whose shorter stages take as long for every token as data.seq_len."""
        found = stages(self.config, data_ranks=self.layout.data)
        tokens = sum((stage.stop_step - stage.first_step) * stage.tokens_per_step for stage in found)
        return tokens / found[-1].tokens_per_step * self.seconds / 3600


def candidates(config: Config, machines: Machines) -> Iterator[Plan]:
    """Every legal layout of a run."""
    for split in _splits(config, machines):
        data = machines.gpus // (split.parallel.tensor * split.parallel.context)
        for micro in _divisors(max(1, config.train.global_batch_size // data)):
            batched = replace(split, train=replace(split.train, micro_batch_size=micro))
            if not is_legal(batched, world_size=machines.gpus):
                continue
            for recompute in RECOMPUTE:
                for engine in ENGINES:
                    engine_section = replace(config.engine, name=engine.name, zero_stage=engine.zero_stage)
                    found = replace(batched, engine=engine_section,
                                    train=replace(batched.train, activation_checkpointing=recompute))
                    yield Plan(found, machines)


def _splits(config: Config, machines: Machines) -> Iterator[Config]:
    """Configurations of every way to cut a model and a sequence over the ranks."""
    for tensor in _divisors(machines.gpus):
        for context in _divisors(machines.gpus // tensor):
            for sequence in (False, True) if tensor > 1 else (False,):
                for method in METHODS if context > 1 else ("auto",):
                    parallel = replace(config.parallel, tensor=tensor, context=context, sequence=sequence,
                                       context_method=method)
                    yield replace(config, parallel=parallel)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def fastest(plans: Iterable[Plan]) -> list[Plan]:
    """Those that fit, the fastest first; of those that are within 1 % of each other the one that splits less, and has
    the simpler engine."""
    fitting = [plan for plan in plans if plan.fits]
    least = min((plan.seconds for plan in fitting), default=1.0)
    engines = [(engine.name, engine.zero_stage) for engine in ENGINES]

    def rank(plan: Plan) -> tuple[float, ...]:
        parallel, engine = plan.config.parallel, plan.config.engine
        return (round(plan.seconds / least, 2), parallel.tensor * parallel.context, parallel.sequence,
                engines.index((engine.name, engine.zero_stage)) if engine.name == "deepspeed" else len(engines),
                plan.bytes)

    return sorted(fitting, key=rank)


def best_of_each(plans: Iterable[Plan]) -> list[Plan]:
    """The first of each way to cut a sequence and a model."""
    found: dict[tuple[int, int, bool, str], Plan] = {}
    for plan in plans:
        parallel = plan.config.parallel
        found.setdefault((parallel.tensor, parallel.context, parallel.sequence, parallel.context_method), plan)
    return list(found.values())


def nearest(config: Config, machines: Machines) -> Plan | None:
    """The layout that fits and changes the least of a configuration: recomputation first, then the micro-batch, then
    how it is split, then the engine; None: none fits."""
    def changes(plan: Plan) -> tuple[int, float]:
        new, train = plan.config, plan.config.train
        return (8 * (new.engine.name != config.engine.name or new.engine.zero_stage != config.engine.zero_stage)
                + 4 * (new.parallel.tensor != config.parallel.tensor or new.parallel.context != config.parallel.context
                       or new.parallel.sequence != config.parallel.sequence)
                + 2 * (train.micro_batch_size != config.train.micro_batch_size)
                + (train.activation_checkpointing != config.train.activation_checkpointing), plan.seconds)

    return min((plan for plan in candidates(config, machines) if plan.fits), key=changes, default=None)


def longest(config: Config, machines: Machines) -> tuple[int, Plan] | None:
    """The longest data.seq_len that these GPUs train at a micro-batch of 1, and how; None: not even the shortest."""
    best: tuple[int, Plan] | None = None
    for split in _splits(replace(config, train=replace(config.train, seq_len_warmup="none", seq_len_warmup_steps=None)),
                         machines):
        data = machines.gpus // (split.parallel.tensor * split.parallel.context)
        train = replace(split.train, micro_batch_size=1, activation_checkpointing="full",
                        global_batch_size=-(-config.train.global_batch_size // data) * data)
        base = replace(split, train=train, engine=replace(config.engine, name="deepspeed", zero_stage=3))
        at_least = best[0] if best else 0
        length = longest_of(base, machines, at_least)
        if length > at_least:
            best = length, Plan(at_length(base, length), machines)
    return best


def longest_of(base: Config, machines: Machines, at_least: int = 0) -> int:
    """The longest data.seq_len that this layout trains, in tokens and more than `at_least`; else 0."""
    def fits(length: int) -> bool:
        config = at_length(base, length * LENGTH_STEP)
        return is_legal(config, world_size=machines.gpus) and Plan(config, machines).fits

    low, high = at_least // LENGTH_STEP, at_least // LENGTH_STEP + 1
    if not fits(high):
        return 0
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * LENGTH_STEP


def at_length(config: Config, length: int) -> Config:
    """The same run on windows of another length."""
    return replace(config, data=replace(config.data, seq_len=length, val_seq_len=None),
                   model=replace(config.model, max_seq_len=max(length, config.model.max_seq_len)))


def fewest_gpus(config: Config, machines: Machines) -> Plan | None:
    """The fastest layout on the fewest GPUs that fit, at most those there are; None: none does."""
    for gpus in _divisors(machines.gpus):
        found = fastest(candidates(config, replace(machines, gpus=gpus)))
        if found:
            return found[0]
    return None
