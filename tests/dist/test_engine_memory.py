"""What an engine holds of every parameter on one rank, against the table of the memory's formula."""

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.memory import ENGINE_BYTES, FP32, STATE_BYTES, parameters, training_memory
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.build_engine import build_engine
from tests.dist.harness import run_distributed

WIDTH, LAYERS = 256, 8
WEIGHTS = LAYERS * WIDTH**2
ENGINES = {"fsdp": EngineSection(name="fsdp"), "zero0": EngineSection(zero_stage=0),
           "zero1": EngineSection(zero_stage=1), "zero2": EngineSection(zero_stage=2),
           "zero3": EngineSection(zero_stage=3)}
TOLERANCE = 0.05


class _Deep(nn.Module):
    """[B, WIDTH] -> the same; weights are all that it needs memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _peaks() -> dict[str, float]:
    """Bytes of every weight by engine, over three steps of two micro-batches."""
    groups, found = init_groups(), {}
    table = {f"layers.{i}.weight": Placement() for i in range(LAYERS)}
    for name, section in ENGINES.items():
        config = Config(train=TrainSection(run_dir="unused", micro_batch_size=1, global_batch_size=2), engine=section)
        model = _Deep()
        with peak_tensor_bytes() as peak:
            engine = build_engine(config, model, table, groups)
            for _ in range(3):
                engine.module.train()
                for _ in range(2):
                    engine.backward(engine.module(torch.ones(1, WIDTH)).square().sum())
                engine.step(1e-3)
        found[name] = FP32 + peak.bytes / WEIGHTS
    return found


def test_the_table_is_what_engines_hold() -> None:
    found = run_distributed(_peaks, 1)[0]
    print({name: f"{size:.1f}, by the table {STATE_BYTES + ENGINE_BYTES[name]:.1f}" for name, size in found.items()})
    assert found == pytest.approx({name: STATE_BYTES + size for name, size in ENGINE_BYTES.items()}, rel=TOLERANCE)


def test_the_formula_counts_the_engine() -> None:
    section = ModelSection()
    plain = training_memory(section, 1024)
    for name, engine in ENGINES.items():
        more = training_memory(section, 1024, engine=engine).total - plain.total
        assert more == pytest.approx(ENGINE_BYTES[name] * parameters(section))
