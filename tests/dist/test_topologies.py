"""Training through DeepSpeed over tensor, context and data ranks equals training on one rank, at every ZeRO stage."""

from pathlib import Path

import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import Row, read_rows
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed

STEPS = 20
TOLERANCE = 1e-5
TOPOLOGIES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
STAGES = (0, 1, 2, 3)
FAST = [((1, 1, 1), 1), ((2, 1, 1), 3), ((1, 2, 1), 2), ((1, 2, 2), 0)]


def run_config(shards: Path, directory: Path, topology: tuple[int, int, int], stage: int) -> Config:
    tensor, context, data = topology
    return Config(
        model=ModelSection(num_layers=2, hidden_size=32, max_seq_len=250, filter_order=16, embed_dropout=0.1),
        data=DataSection(shards=str(shards), seq_len=250, num_workers=0),  # no number of context ranks divides 250
        train=TrainSection(run_dir=str(directory / f"{tensor}-{context}-{data}-zero{stage}"), steps=STEPS,
                           micro_batch_size=2, global_batch_size=8, eval_every=0, save_every=10),
        # Adam's g / (|g| + eps) amplifies the rounding of small gradients; clipping acts at every step.
        optim=OptimSection(lr=2e-3, warmup_steps=5, eps=1e-4, grad_clip=0.5),
        parallel=ParallelSection(tensor=tensor, context=context, sequence=tensor > 1),
        engine=EngineSection(zero_stage=stage),
    )


def _train_all(configs: list[Config]) -> None:
    for config in configs:
        groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            trainer.fit()


def train(shards: Path, directory: Path, runs: list[tuple[tuple[int, int, int], int]]) -> None:
    by_ranks: dict[int, list[Config]] = {}
    for topology, stage in runs:
        ranks = topology[0] * topology[1] * topology[2]
        by_ranks.setdefault(ranks, []).append(run_config(shards, directory, topology, stage))
    for ranks, configs in by_ranks.items():
        run_distributed(_train_all, ranks, configs, timeout=900)


def rows(config: Config) -> list[Row]:
    return [row for row in read_rows(Path(config.train.run_dir) / "metrics.jsonl") if row.split == "train"]


def differences(found: list[Row], expected: list[Row]) -> tuple[float, float]:
    """Largest relative difference of the losses and of the gradient norms."""
    assert [row.step for row in found] == [row.step for row in expected]
    return tuple(max(abs(getattr(a, key) - getattr(b, key)) / getattr(b, key)
                     for a, b in zip(found, expected, strict=True)) for key in ("loss", "grad_norm"))


def check(shards: Path, directory: Path, runs: list[tuple[tuple[int, int, int], int]]) -> None:
    expected = rows(run_config(shards, directory, *runs[0]))
    assert len(expected) == STEPS
    assert min(row.grad_norm for row in expected) > 0.5, "clipping must act"
    for topology, stage in runs:
        loss, norm = differences(rows(run_config(shards, directory, topology, stage)), expected)
        print(f"(T, P, D) = {topology}, ZeRO-{stage}: losses {loss:.1e}, gradient norms {norm:.1e}, limit {TOLERANCE}")
        assert max(loss, norm) < TOLERANCE, (topology, stage)


def test_some_topologies_and_every_stage_equal_one_rank(shards, tmp_path):
    assert {stage for _, stage in FAST} == set(STAGES)
    train(shards, tmp_path, FAST)
    check(shards, tmp_path, FAST)


@pytest.mark.slow
def test_every_topology_at_every_stage_equals_one_rank(shards, tmp_path):
    runs = [(topology, stage) for topology in TOPOLOGIES for stage in STAGES]
    train(shards, tmp_path, runs)
    check(shards, tmp_path, runs)
