"""A mixture with weighted bases trains and validates alike at every layout: its losses, sums and metrics."""

from pathlib import Path
from typing import Any

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
from hyena_dist.train.pretraining import Pretraining
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.genomes import genome, shards

L, STEPS = 128, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {}, "context": {"parallel": ParallelSection(context=2)}, "tensor": {"parallel": ParallelSection(tensor=2)},
    "fsdp": {"engine": EngineSection(name="fsdp")}}
TOLERANCE = 2e-5


def config_of(sets: Path, run_dir: Path, weight: float = 0.1, **sections: Any) -> Config:
    mixture = [{"name": "one", "shards": "one/shards", "weight": 1}, {"name": "two", "shards": "two/shards",
                                                                      "weight": 2}]
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=L, filter_order=8, embed_dropout=0.0),
        data=DataSection(shards=str(sets), seq_len=L, num_workers=0, rc_augment=True, mixture=mixture,
                         mixture_schedule=[{"step": 2, "weights": {"one": 3, "two": 1}}], lower_case_weight=weight),
        train=TrainSection(run_dir=str(run_dir), steps=STEPS, micro_batch_size=1, global_batch_size=4, eval_every=2,
                           save_every=0),
        optim=OptimSection(lr=1e-3, warmup_steps=1, eps=1e-4), **sections)


def _masses(objective: Pretraining) -> dict[str, float]:
    scores = objective.validate(objective.module, iter)
    assert scores is not None
    return {name: value for name, value in scores.extras.items() if name.startswith("source_loss_mass")}


def _loss_mass(sets: Path, directory: Path) -> list[dict[str, float]]:
    """After 4 steps in one go, and with another layout for the last 2."""
    def objective(context: int) -> Pretraining:
        parallel = ParallelSection(context=context)
        return Pretraining(config_of(sets, directory, parallel=parallel), init_groups(context=context),
                           torch.device("cpu"))

    whole, first, second = objective(1), objective(1), objective(2)
    for _ in range(4):
        whole.next_step()
    for _ in range(2):
        first.next_step()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.next_step()
    return [_masses(whole), _masses(second)]


def _on_each_rank(sets: Path, directory: Path) -> list[dict[str, float]]:
    layouts = {**LAYOUTS, "control": {"weight": 1.0}}
    for name, layout in layouts.items():
        parallel = layout.get("parallel", ParallelSection())
        groups = init_groups(tensor=parallel.tensor, context=parallel.context)
        with open_trainer(config_of(sets, directory / name, **layout), groups, torch.device("cpu")) as trainer:
            trainer.fit()
    return _loss_mass(sets, directory / "masses")


@pytest.fixture(scope="module")
def masses() -> list[list[dict[str, float]]]:
    """Of each rank, filled in by `runs`."""
    return []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, masses: list[list[dict[str, float]]]) -> dict[str, list[Row]]:
    directory = tmp_path_factory.mktemp("layouts")
    for number, name in enumerate(("one", "two")):
        (directory / name).mkdir()
        shards(directory / name, genome(number, 3000, 900), FractionSplits(0.2))
    masses += run_distributed(_on_each_rank, 2, directory, directory / "runs")
    return {name: read_rows(directory / "runs" / name / "metrics.jsonl") for name in (*LAYOUTS, "control")}


def numbers(row: Row) -> dict[str, float]:
    """What does not depend on the machine."""
    own = {name: value for name, value in row.extras.items() if name.startswith(("source_", "species_", "case_"))}
    return {"loss": row.loss, "scored": row.scored or 0.0, "epoch": row.epoch or 0.0, **own}


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_is_the_same_training(runs: dict[str, list[Row]], name: str) -> None:
    assert len(runs[name]) == len(runs["data"]) == STEPS + 2
    for row, other in zip(runs[name], runs["data"], strict=True):
        found, expected = numbers(row), numbers(other)
        assert found.keys() == expected.keys()
        worst = max(abs(found[key] / expected[key] - 1) for key in found)
        print(f"{name}, {row.split} {row.step}: {worst:.1e}, tolerance {TOLERANCE}")
        assert worst < TOLERANCE


@pytest.mark.usefixtures("runs")
def test_loss_mass_is_exact_when_a_run_goes_on_at_another_layout(masses: list[list[dict[str, float]]]) -> None:
    (whole, resumed), other = masses
    assert whole == resumed
    assert other == [whole, resumed], "the same on every rank"
    assert sum(whole.values()) == pytest.approx(1)
    assert len(set(whole.values())) == 2


def test_rows_say_what_came_of_each_source(runs: dict[str, list[Row]]) -> None:
    first, last = (row.extras for row in runs["data"] if row.split == "val")
    assert first["source_share/one"] == pytest.approx(1 / 3, abs=0.06)
    assert last["source_share/one"] > 0.5
    assert last["source_loss_mass/one"] + last["source_loss_mass/two"] == pytest.approx(1)
    assert {name for name in last if name.endswith("/two")} == {
        f"source_{kind}/two" for kind in ("perplexity", "share", "epochs", "unique_bases", "loss_mass")}


def test_control_without_weights_another_loss(runs: dict[str, list[Row]]) -> None:
    weighted, bare = (runs[name][0] for name in ("data", "control"))
    assert abs(weighted.loss / bare.loss - 1) > 10 * TOLERANCE
    assert weighted.scored < bare.scored == int(bare.scored)
