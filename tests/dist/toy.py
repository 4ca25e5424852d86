"""A small model with what makes sharding hard: sizes that no number of ranks divides, a fused weight, two groups."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.engine.protocol import Engine
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.train.build_engine import build_engine
from hyena_dist.train.optimizer import parameter_groups

# Adam's g / (|g| + eps) amplifies rounding of small gradients; a large eps keeps comparisons about the engine.
OPTIM = OptimSection(lr=1e-2, weight_decay=0.1, eps=1e-4, grad_clip=0.5)
GLOBAL_BATCH, MICRO_BATCH = 8, 2
TABLE = {
    "gates.weight": Placement(parts=("x0", "v")),
    "gates.bias": Placement(parts=("x0", "v")),
    "filter": Placement(weight_decay=False),
    "scale": Placement(weight_decay=False),
    "out.weight": Placement(),
    "out.bias": Placement(),
}


class Toy(nn.Module):
    """[B, 3] -> [B, 1]"""

    def __init__(self, seed: int = 0, frozen: Collection[str] = ()) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gates = nn.Linear(3, 10)
        self.filter = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(5, 1)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x0, v = torch.tanh(self.gates(x)).chunk(2, dim=-1)
        return self.out(x0 * v * self.filter * self.scale)


@dataclass(frozen=True)
class Record:
    """What one optimizer step gave: plain numbers, comparable across processes."""

    loss: float
    grad_norm: float
    applied: bool = True
    overflow: bool = False


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, the same on every rank and at every world size."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, 3, generator=generator)
    return x, 10 * torch.sin(x.sum(1, keepdim=True))


def data_groups() -> Groups:
    """Every rank is a data rank."""
    world = Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    alone = Axis([dist.new_group([rank]) for rank in range(world.size)][world.rank], 0, 1)
    return Groups(tensor=alone, context=alone, data=world, data_context=world, world=world)


def engine_section(stage: int | str, offload: str = "none") -> EngineSection:
    """DeepSpeed at a ZeRO stage, or "fsdp"."""
    return (EngineSection(name="fsdp", offload=offload) if stage == "fsdp" else
            EngineSection(zero_stage=int(stage), offload=offload))


def make_engine(stage: int | str, groups: Groups, *, seed: int = 0, optim: OptimSection = OPTIM, offload: str = "none",
                precision: str = "fp32", micro_batch: int = MICRO_BATCH, deepspeed: Mapping[str, Any] | None = None,
                frozen: Collection[str] = ()) -> Engine:
    """An engine for Toy with these weights frozen. fp16 gives it a loss scale; Toy computes in float32 all the same."""
    train_section = TrainSection(run_dir="unused", precision=precision, micro_batch_size=micro_batch,
                                 global_batch_size=GLOBAL_BATCH)
    engine = replace(engine_section(stage, offload), deepspeed=dict(deepspeed or {}))
    config = Config(train=train_section, optim=optim, engine=engine)
    return build_engine(config, Toy(seed, frozen), TABLE, groups)


def train(engine: Engine, groups: Groups, steps: Sequence[int], *, poison: float | None = None,
          factor: float | None = None) -> list[Record]:
    """Take optimizer steps, in as many micro-batches as the engine accumulates; `poison` multiplies the loss of the
    last micro-batch of the last rank only, and `factor` replaces the loss's factor, the number of data ranks."""
    factor = groups.data.size if factor is None else factor
    records = []
    for step in steps:
        x, y = (part.chunk(groups.data.size)[groups.data.rank].chunk(engine.accumulation_steps) for part in batch(step))
        total = torch.zeros(())
        with torch.no_grad():  # an evaluation between steps, as in a run, must leave no trace
            engine.module.eval()  # DeepSpeed's returns None
            engine.module(x[0])
            engine.module.train()
        for micro in range(engine.accumulation_steps):
            loss = (engine.module(x[micro]) - y[micro]).square().sum() / GLOBAL_BATCH
            last = micro == engine.accumulation_steps - 1 and groups.data.rank == groups.data.size - 1
            engine.backward(loss * factor * (poison if poison is not None and last else 1.0))
            total += loss.detach()
        result = engine.step(learning_rate_of(step))
        assert result.grad_norm.dim() == 0
        dist.all_reduce(total)
        records.append(Record(float(total), float(result.grad_norm), result.applied, result.overflow))
    return records


def train_plain(steps: Sequence[int], optim: OptimSection = OPTIM, frozen: Collection[str] = (),
                model: Toy | None = None) -> tuple[list[Record], dict[str, torch.Tensor]]:
    """The same steps in one process, with torch only: records and final weights. Without a `model` it is the one that
    `make_engine` makes."""
    model = Toy(frozen=frozen) if model is None else model
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), TABLE, optim.weight_decay),
                                  betas=optim.betas, eps=optim.eps)
    records = []
    for step in steps:
        x, y = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step)
        loss = (model(x) - y).square().sum() / GLOBAL_BATCH
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        records.append(Record(float(loss.detach()), float(norm)))
    return records, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def learning_rate_of(step: int) -> float:
    return OPTIM.lr / (1 + step)


def state_of(engine: Engine) -> dict[str, Any]:
    """Weights, moments and step count, detached from the engine."""
    state: dict[str, Any] = {f"{name}/{field}": tensor.clone() for name in engine.parameter_shapes
                             for field, tensor in engine.export_parameter(name).items()}
    return state | {"steps": engine.optimizer_step_count}
