"""Runs over short contigs, packed: the same losses at every layout and after a resume in the middle of an epoch; a
validation is that of padded windows."""

from pathlib import Path
from typing import Any

import numpy as np
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
from hyena_dist.model import mixer
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.metrics import Row, read_rows
from hyena_dist.train.pretraining import Pretraining
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.genomes import genome, shards

L, STEPS, CUT = 256, 6, 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {}, "context": {"parallel": ParallelSection(context=2), "micro": 2, "recompute": "block"},
    "fsdp": {"engine": EngineSection(name="fsdp")}}
MORE: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": ParallelSection(tensor=2, sequence=True)}, "zero3": {"engine": EngineSection(zero_stage=3)},
    "micro": {"micro": 2}, "four": {"parallel": ParallelSection(tensor=2, context=2), "recompute": "full"},
    "context of four": {"parallel": ParallelSection(context=4)}}
TOLERANCE = 2e-5


def config_of(sets: Path, run_dir: Path, *, micro: int = 1, steps: int = STEPS, pack: bool = True,
              recompute: str = "none", **sections: Any) -> Config:
    mixture = [{"name": "short", "shards": "short/shards", "weight": 2}, {"name": "long", "shards": "long/shards",
                                                                         "weight": 1}]
    return Config(
        model=ModelSection(num_layers=2, hidden_size=16, max_seq_len=L, filter_order=8, embed_dropout=0.1,
                           layer_pattern="HA", num_attention_heads=4),
        data=DataSection(shards=str(sets), seq_len=L, num_workers=0, rc_augment=True, pack=pack, mixture=mixture,
                         lower_case_weight=0.5),
        train=TrainSection(run_dir=str(run_dir), steps=steps, micro_batch_size=micro, global_batch_size=8, eval_every=3,
                           save_every=3, seq_len_warmup=[{"seq_len": 128, "steps": 2}],
                           activation_checkpointing=recompute),
        optim=OptimSection(lr=1e-3, schedule="constant", warmup_steps=1, eps=1e-4), **sections)


def train(config: Config, groups: Groups) -> None:
    with open_trainer(config, groups, torch.device("cpu")) as trainer:
        trainer.fit()


def _on_each_rank(sets: Path, directory: Path, layouts: dict[str, dict[str, Any]]) -> None:
    for name, layout in layouts.items():
        parallel = layout.get("parallel", ParallelSection())
        groups = init_groups(tensor=parallel.tensor, context=parallel.context)
        train(config_of(sets, directory / name, **layout), groups)
    if "context" in layouts:  # once more, cut in the middle, and the rest on two data ranks
        train(config_of(sets, directory / "resumed", steps=CUT, **layouts["context"]), init_groups(context=2))
        train(config_of(sets, directory / "resumed"), init_groups())


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transcripts of 20 to 300 bases, and contigs that are longer than a window."""
    directory = tmp_path_factory.mktemp("sets")
    lengths = np.random.default_rng(0).integers(20, 300, 40).tolist()
    for number, (name, contigs) in enumerate({"short": lengths, "long": [900, 700]}.items()):
        (directory / name).mkdir()
        shards(directory / name, genome(number, *contigs), FractionSplits(0.2))
    return directory


@pytest.fixture(scope="module")
def runs(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    directory = tmp_path_factory.mktemp("runs")
    run_distributed(_on_each_rank, 2, sets, directory, LAYOUTS)
    return rows_in(directory)


def rows_in(directory: Path) -> dict[str, list[Row]]:
    return {path.parent.name: read_rows(path) for path in directory.glob("*/metrics.jsonl")}


def numbers(row: Row) -> dict[str, float]:
    """What does not depend on the machine, nor on where a run was cut."""
    own = {name: value for name, value in row.extras.items()
           if name.startswith(("source_", "species_", "case_")) and "loss_mass" not in name}
    return {"loss": row.loss, "scored": row.scored or 0.0, "epoch": row.epoch or 0.0, **own}


def check_same(name: str, rows: list[Row], expected_rows: list[Row]) -> None:
    assert len(rows) == len(expected_rows) == STEPS + 2
    for row, other in zip(rows, expected_rows, strict=True):
        found, expected = numbers(row), numbers(other)
        assert found.keys() == expected.keys()
        worst = max(abs(found[key] / expected[key] - 1) for key in found)
        print(f"{name}, {row.split} {row.step}: {worst:.1e}, tolerance {TOLERANCE}")
        assert worst < TOLERANCE


@pytest.mark.parametrize("name", [*list(LAYOUTS)[1:], "resumed"])
def test_every_layout_is_the_same_training(runs: dict[str, list[Row]], name: str) -> None:
    check_same(name, runs[name], runs["data"])


@pytest.mark.slow
def test_more_layouts_are_the_same_training(runs: dict[str, list[Row]], sets: Path, tmp_path: Path) -> None:
    by_ranks: dict[int, dict[str, dict[str, Any]]] = {}
    for name, layout in MORE.items():
        parallel = layout.get("parallel", ParallelSection())
        by_ranks.setdefault(max(2, parallel.tensor * parallel.context), {})[name] = layout
    for ranks, layouts in by_ranks.items():
        run_distributed(_on_each_rank, ranks, sets, tmp_path, layouts)
    for name, rows in rows_in(tmp_path).items():
        check_same(name, rows, runs["data"])


def test_a_packed_validation_is_that_of_padded_windows(sets: Path, tmp_path: Path, monkeypatch) -> None:
    """And the control: where borders are forgotten it is another. All are of the same initial weights."""
    found = {}
    for name in ("padded", "packed", "borders forgotten"):
        if name == "borders forgotten":
            monkeypatch.setattr(mixer, "segments_of", lambda *_: None)
        task = Pretraining(config_of(sets, tmp_path, pack=name != "padded"), Groups.single(), torch.device("cpu"))
        scores = task.validate(task.module.eval(), iter)
        task.close()
        assert scores is not None
        found[name] = {"loss": scores.loss, "scored": scores.scored, **scores.extras}
    assert found["packed"]["scored"] == found["padded"]["scored"]
    assert found["packed"].keys() == found["padded"].keys()
    worst = {name: max(abs(values[key] / found["padded"][key] - 1) for key in values) for name, values in found.items()}
    print(f"packed {worst['packed']:.1e}, tolerance {TOLERANCE}; borders forgotten {worst['borders forgotten']:.1e}")
    assert worst["packed"] < TOLERANCE < 1e-4 < worst["borders forgotten"]

