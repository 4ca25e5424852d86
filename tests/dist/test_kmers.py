"""K-mers over ranks: their vocabulary split over tensor ranks, their windows over context ranks."""

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
from hyena_dist.data.splits import FractionSplits
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import Row, read_rows
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.dist.test_parallel import TOLERANCE, Case, compare
from tests.genomes import genome, shards

CASES = [Case(2, 1, 1, kmer=3), Case(2, 1, 1, kmer=4, tied=False, sequence=True)]
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
"""Tensor and context ranks of training runs; the first has two data ranks."""
STEPS = 4


def run_config(directory: Path, overlap: bool, tensor: int, context: int) -> Config:
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=50, filter_order=8, embed_dropout=0.1, kmer=3,
                           kmer_overlap=overlap),
        data=DataSection(shards=str(directory / "shards"), seq_len=50, num_workers=0, rc_augment=True,
                         lower_case_weight=0.5),
        train=TrainSection(run_dir=str(directory / f"{overlap}-{tensor}-{context}"), steps=STEPS, micro_batch_size=2,
                           global_batch_size=4, eval_every=STEPS, save_every=0),
        optim=OptimSection(lr=2e-3, warmup_steps=1, eps=1e-4),
        parallel=ParallelSection(tensor=tensor, context=context), engine=EngineSection(name="fsdp"))


def _run(configs: list[Config]) -> list[dict[str, float]]:
    groups = {layout: init_groups(tensor=layout[0], context=layout[1]) for layout in LAYOUTS}
    errors = [compare(case, groups[case.tensor, case.context]) for case in CASES]
    for config in configs:
        with open_trainer(config, groups[config.parallel.tensor, config.parallel.context],
                          torch.device("cpu")) as trainer:
            trainer.fit()
    return errors


def rows(config: Config) -> list[Row]:
    return read_rows(Path(config.train.run_dir) / "metrics.jsonl")


def test_kmers_over_ranks_equal_those_of_one(tmp_path):
    shards(tmp_path, genome(4, 3000, 700), FractionSplits(0.2))
    configs = [run_config(tmp_path, overlap, *layout) for overlap in (False, True) for layout in LAYOUTS]
    for errors in run_distributed(_run, 2, configs, timeout=240):
        for case, found in zip(CASES, errors, strict=True):
            assert max(found.values()) < TOLERANCE["fp64"], (case, found)
    for runs in (configs[:3], configs[3:]):
        expected, *others = (rows(config) for config in runs)
        assert [row.split for row in expected] == ["train"] * STEPS + ["val"]
        for found in others:
            assert [row.scored for row in found] == [row.scored for row in expected]
            assert [row.loss for row in found] == pytest.approx([row.loss for row in expected], rel=2e-5)
    apart, one_base = (rows(run)[-1] for run in (configs[0], configs[3]))
    assert apart.perplexity < 64 ** (1 / 3) * 1.2, "per base, not per token"
    assert one_base.scored > 0.9 * apart.scored
