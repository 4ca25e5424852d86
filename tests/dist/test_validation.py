"""The validation of a run: the same windows and loss at every layout, a cap, and two batches before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.cli.build import main as build_shards
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.manifest import Manifest
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from hyena_dist.train.trainer import Trainer
from tests.conftest import SAMPLE
from tests.dist.harness import run_distributed

CAP, L = 4000, 128
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {}, "micro": {"micro": 2}, "context": {"parallel": ParallelSection(context=2)},
    "zero3": {"engine": EngineSection(zero_stage=3)}, "fsdp": {"engine": EngineSection(name="fsdp")}}
TOLERANCE = 2e-5


def config_of(shards: str, run_dir: Path, micro: int = 1, **sections: Any) -> Config:
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=L, filter_order=8, embed_dropout=0.1),
        data=DataSection(shards=shards, seq_len=L, num_workers=0, val_tokens=CAP),
        train=TrainSection(run_dir=str(run_dir), steps=2, micro_batch_size=micro, global_batch_size=4, eval_every=1,
                           save_every=0),
        optim=OptimSection(lr=1e-3, warmup_steps=1, eps=1e-4), **sections)


def _asked(trainer: Trainer) -> list[tuple[int, int, int]]:
    """Fills with the step, the batches taken, and those that there are, of every validation."""
    asked: list[tuple[int, int, int]] = []
    validate = trainer.objective.validate

    def recorded(module: Any, watched: Any) -> Any:
        taken = []

        def counted(batches: Any) -> Any:
            for batch in watched(batches):
                taken.append(batch)
                yield batch
            asked.append((trainer.status.step, len(taken), len(batches)))

        return validate(module, counted)

    trainer.objective.validate = recorded  # type: ignore[method-assign]
    return asked


def _on_each_rank(shards: str, unvalidated: str, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cpu = torch.device("cpu")
    for name, layout in LAYOUTS.items():
        groups = init_groups(context=layout.get("parallel", ParallelSection()).context)
        with open_trainer(config_of(shards, directory / name, **layout), groups, cpu) as trainer:
            found[name] = _asked(trainer)
            trainer.fit()
    with open_trainer(config_of(unvalidated, directory / "without"), init_groups(), cpu) as trainer:
        trainer.fit()
    steps: list[int] = []
    with pytest.raises(MemoryError):
        _train_without_room(config_of(shards, directory / "too large"), steps)
    found["too large"] = steps
    return found


def _train_without_room(config: Config, steps: list[int]) -> None:
    """On a device that has no room for what only a validation needs; fills in the step at which that is found."""
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        forward = trainer.engine.module.forward

        def full(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                steps.append(trainer.status.step)
                raise MemoryError("no room")
            return forward(*args, **kwargs)

        trainer.engine.module.forward = full
        trainer.fit()


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("validation")
    assert build_shards([str(SAMPLE / "phix174.fa.gz"), "--out", str(directory / "unvalidated")]) == 0
    return directory, run_distributed(_on_each_rank, 2, str(shards), str(directory / "unvalidated"), directory)


def validations(run_dir: Path) -> list[Any]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.split == "val"]


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_the_capped_loss_is_the_same_at_every_layout(runs: Any, name: str) -> None:
    directory, _ = runs
    for own, other in zip(validations(directory / name), validations(directory / "data"), strict=True):
        assert own.scored == other.scored
        difference = abs(own.loss - other.loss) / other.loss
        one_window = 1 / (CAP // L)  # of which a loss is the mean: leaving one out moves it by a share of that
        print(f"{name}: {difference:.1e} apart, at most {TOLERANCE}; a window is {one_window:.1e} of the mean")
        assert difference < TOLERANCE
    assert other.scored <= CAP


def test_two_batches_are_tried_before_the_first_step_and_then_all_are_measured(runs: Any) -> None:
    for rank in runs[1]:
        for name in LAYOUTS:
            [(tried_at, tried, there_are), *measured] = rank[name]
            assert (tried_at, tried) == (0, 2), name
            assert measured == [(1, there_are, there_are), (2, there_are, there_are)], name
            assert there_are > 2


def test_what_does_not_fit_fails_before_the_first_step(runs: Any) -> None:
    directory, ranks = runs
    assert [rank["too large"] for rank in ranks] == [[0], [0]]
    assert read_rows(directory / "too large" / "metrics.jsonl") == []


def test_a_run_without_validation_bases_trains(runs: Any) -> None:
    rows = read_rows(runs[0] / "without" / "metrics.jsonl")
    assert [(row.step, row.split) for row in rows] == [(1, "train"), (2, "train")]


def test_rows_have_the_epoch_and_the_time(runs: Any, shards: Path) -> None:
    rows = read_rows(runs[0] / "data" / "metrics.jsonl")
    windows = sum(-(-(interval.bases - 1) // L) for interval in Manifest.load(shards).intervals("train"))
    for row in rows:
        assert row.epoch == pytest.approx(4 * row.step / windows, rel=0.02)
    times = [row.time for row in rows]
    assert times == sorted(times)
    assert times[0] > 1.7e9
