"""Any combination of engine, stage, tensor, context, sequence and data ranks, precision and workers resumes what any
other saved.

The canonical run is one process at ZeRO-0 in float32. A row trains 20 steps and saves at step 10. Its checkpoint is
compared with the canonical one, it resumes from the canonical one and from its own, and random pairs of rows resume
each other's.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from tests.compare import rel
from tests.dist.harness import run_distributed

STEPS, CUT = 20, 10
LOSS, STATE = 1e-5, 1e-5
LOWERED = {"fp32": 0.0, "bf16": 2e-3, "fp16": 2e-4}
"""What a lower precision may move a loss by: it computes something else, and the bar says how much else."""


@dataclass(frozen=True)
class Row:
    """One way to run the same training."""

    engine: str = "deepspeed"
    stage: int = 1
    tensor: int = 1
    context: int = 1
    sequence: bool = False
    data: int = 1
    precision: str = "fp32"
    offload: str = "none"
    workers: int = 0

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def name(self) -> str:
        engine = f"zero{self.stage}" if self.engine == "deepspeed" else "fsdp"
        layout = f"T{self.tensor}{'s' if self.sequence else ''}-P{self.context}-D{self.data}"
        offload = "" if self.offload == "none" else f"-offload-{self.offload}"
        return f"{engine}-{layout}-{self.precision}{offload}-w{self.workers}"


CANONICAL = Row(stage=0)
ROWS = [
    CANONICAL,
    Row(stage=1, data=2),
    Row(stage=2, tensor=2),
    Row(stage=3, context=2),
    Row("fsdp", data=2),
    Row("fsdp", tensor=2, sequence=True),
    Row(stage=3, tensor=2, sequence=True, workers=1),
    Row("fsdp", context=2),
    Row(stage=2, data=2, offload="optimizer"),
    Row(stage=1, tensor=2, context=2, sequence=True),
    Row(stage=2, context=2, data=2),
    Row(stage=3, tensor=2, data=2),
    Row("fsdp", tensor=2, context=2, sequence=True),
    Row("fsdp", context=2, data=2, workers=1),
    Row(stage=1, context=4),
    Row(stage=2, tensor=2, context=2, sequence=True, data=2),
    Row("fsdp", tensor=2, context=2, sequence=True, data=2),
    Row(stage=1, data=2, precision="bf16"),
    Row(stage=3, tensor=2, sequence=True, precision="bf16"),
    Row("fsdp", context=2, precision="fp16"),
]
FAST = [ROWS[i] for i in (0, 1, 3, 5, 18, 19)]


def config_of(row: Row, shards: Path, run_dir: Path, resume: Path | None = None) -> Config:
    return Config(
        model=ModelSection(num_layers=2, hidden_size=32, max_seq_len=250, filter_order=16, embed_dropout=0.1),
        data=DataSection(shards=str(shards), seq_len=250, num_workers=row.workers),  # no P divides 250
        train=TrainSection(run_dir=str(run_dir), steps=STEPS, micro_batch_size=2, global_batch_size=4, eval_every=0,
                           save_every=CUT, precision=row.precision, resume="auto" if resume is None else str(resume)),
        # Adam's g / (|g| + eps) amplifies the rounding of small gradients; clipping acts at every step.
        optim=OptimSection(lr=2e-3, warmup_steps=5, eps=1e-4, grad_clip=0.5),
        parallel=ParallelSection(tensor=row.tensor, context=row.context, sequence=row.sequence),
        engine=EngineSection(name=row.engine, zero_stage=row.stage, offload=row.offload),
    )


def _train_all(configs: list[Config]) -> None:
    for config in configs:
        groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            trainer.fit()


def train(runs: list[tuple[Row, Config]]) -> None:
    by_ranks: dict[int, list[Config]] = {}
    for row, config in runs:
        by_ranks.setdefault(row.ranks, []).append(config)
    for ranks, configs in by_ranks.items():
        run_distributed(_train_all, ranks, configs, timeout=1500)


def losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.loss for row in read_rows(run_dir / "metrics.jsonl") if row.split == "train"}


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    return reader.read(reader.shapes)


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Largest relative difference of the losses after the cut."""
    assert sorted(found)[-(STEPS - CUT):] == list(range(CUT + 1, STEPS + 1))
    return max(abs(found[step] - expected[step]) / expected[step] for step in range(CUT + 1, STEPS + 1))


def check(rows: list[Row], crossings: list[tuple[Row, Row]], shards: Path, directory: Path) -> None:
    def checkpoint(row: Row) -> Path:
        return step_directory(directory / row.name / "checkpoints", CUT)

    train([(row, config_of(row, shards, directory / row.name)) for row in rows])
    resumed = [(CANONICAL, row) for row in rows] + [(row, row) for row in rows] + crossings
    train([(target, config_of(target, shards, directory / f"{source.name}--{target.name}", checkpoint(source)))
           for source, target in dict.fromkeys(resumed)])

    canonical, expected = state(checkpoint(CANONICAL)), losses(directory / CANONICAL.name)
    for row in rows:
        saved = state(checkpoint(row))
        assert saved.keys() == canonical.keys()
        worst = max(rel(saved[key], canonical[key]) for key in saved)
        limit = STATE if row.precision == "fp32" else None
        print(f"{row.name}: step {CUT} differs from the canonical one by {worst:.1e}, limit {limit}")
        assert limit is None or worst < limit, row
        own = losses(directory / row.name)
        again = losses(directory / f"{row.name}--{row.name}")
        assert all(again[step] == own[step] for step in range(CUT + 1, STEPS + 1)), f"{row}: not bit for bit"
    for source, target in dict.fromkeys(resumed):
        found = difference(losses(directory / f"{source.name}--{target.name}"), expected)
        limit = max(LOSS, LOWERED[source.precision], LOWERED[target.precision])
        print(f"{source.name} -> {target.name}: losses differ by {found:.1e}, limit {limit}")
        assert found < limit, (source, target)


def test_one_crossing(shards, tmp_path):
    check([CANONICAL, FAST[3]], [(FAST[3], CANONICAL)], shards, tmp_path)


@pytest.mark.slow
def test_a_covering_part_of_the_rows(shards, tmp_path):
    check(FAST, [(FAST[3], FAST[2]), (FAST[2], FAST[1])], shards, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_row_and_ten_random_crossings(shards, tmp_path):
    draw = random.Random(20)
    crossings = [tuple(draw.sample(ROWS, 2)) for _ in range(10)]
    check(ROWS, crossings, shards, tmp_path)


@pytest.mark.slow
def test_control_forgotten_moments_are_seen(shards, tmp_path):
    """A resume that lost Adam's moments must fail the comparison."""
    config = config_of(CANONICAL, shards, tmp_path / "whole")
    train([(CANONICAL, config)])
    cut = step_directory(tmp_path / "whole" / "checkpoints", CUT)
    run_distributed(_train_without_moments, 1, config_of(CANONICAL, shards, tmp_path / "lost", cut))
    found = difference(losses(tmp_path / "lost"), losses(tmp_path / "whole"))
    print(f"without moments the losses differ by {found:.1e}, limit {LOSS}")
    assert found > 10 * LOSS


def _train_without_moments(config: Config) -> None:
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        for name, shape in trainer.engine.parameter_shapes.items():
            weight = trainer.engine.export_parameter(name)["weight"].clone()
            trainer.engine.import_parameter(name, {"weight": weight, "exp_avg": torch.zeros(shape),
                                                   "exp_avg_sq": torch.zeros(shape)})
        trainer.fit()


def test_rows_cover_what_they_must():
    assert len({row.name for row in ROWS}) == len(ROWS) == 20
    assert {row.stage for row in ROWS if row.engine == "deepspeed"} == {0, 1, 2, 3}
    assert {row.ranks for row in ROWS} == {1, 2, 4, 8}
    assert {row.engine for row in FAST} == {"deepspeed", "fsdp"}
    assert {row.precision for row in FAST} == {"fp32", "bf16", "fp16"}
