"""What a run does about steps that are not finite, about stop requests, and at the ends of its length stages."""

import json
import logging
import math
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.directory import read_metadata
from hyena_dist.cli.build import main as build_shards
from hyena_dist.config.errors import TrainingError, UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.config.warmup import stages
from hyena_dist.parallel.groups import init_groups
from hyena_dist.runtime.requeue import requeue_marker
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from hyena_dist.train.trainer import Trainer
from tests.checkpoints import latest
from tests.conftest import SAMPLE
from tests.dist.harness import run_distributed

ENGINES = {"zero0": EngineSection(zero_stage=0), "zero2": EngineSection(zero_stage=2),
           "fsdp": EngineSection(name="fsdp")}
"""One of each kind: stage 0 is guarded by us, the others by DeepSpeed, FSDP2 by us. `test_engine` has every stage."""
STEPS, LOST, SAVE = 12, 7, 5


def config_of(shards: str, run_dir: Path, **train: Any) -> Config:
    settings = {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": 4, "eval_every": 0, "save_every": SAVE}
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=128, filter_order=8, embed_dropout=0.1),
        data=DataSection(shards=shards, seq_len=128, num_workers=0),
        train=TrainSection(run_dir=str(run_dir), **(settings | train)),
        optim=OptimSection(lr=2e-3, warmup_steps=2, eps=1e-4))


def _record_windows(trainer: Trainer) -> dict[int, list[int]]:
    """Fills with the windows of each step as they are taken; a step taken twice keeps the later ones."""
    taken: dict[int, list[int]] = {}
    take = trainer.objective.curriculum.take

    def recorded() -> Any:
        step = trainer.status.step + 1
        stage, batches = take()
        taken[step] = [int(window) for batch in batches for window in batch.windows]
        return stage, batches

    trainer.objective.curriculum.take = recorded  # type: ignore[method-assign]
    return taken


def _poison(trainer: Trainer, steps: set[int], *, again: bool = False) -> None:
    """The gradients of the last micro-batch of these steps are nan on the last rank, once each or whenever they come.
    """
    backward, calls = trainer.engine.backward, []

    def poisoned(loss: torch.Tensor) -> None:
        calls.append(trainer.status.step + 1)
        last = again or calls.count(trainer.status.step + 1) == trainer.engine.accumulation_steps
        hit = (trainer.status.step + 1 in steps and last
               and trainer.groups.world.rank == trainer.groups.world.size - 1)
        backward(loss * math.nan if hit else loss)

    trainer.engine.backward = poisoned  # type: ignore[method-assign]


def _losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.loss for row in read_rows(run_dir / "metrics.jsonl") if row.split == "train"}


def _run_policies(shards: str, directory: Path) -> dict[str, Any]:
    groups, found = init_groups(), {}
    for engine_name, engine in ENGINES.items():
        for policy in ("stop", "skip", "rollback"):
            config = replace(config_of(shards, directory / f"{engine_name}-{policy}", on_nonfinite=policy),
                             engine=engine)
            with open_trainer(config, groups, torch.device("cpu")) as trainer:
                windows = _record_windows(trainer)
                _poison(trainer, {LOST})
                try:
                    trainer.fit()
                    error = None
                except TrainingError as failure:
                    error = str(failure)
                found[f"{engine_name}-{policy}"] = (error, windows, trainer.engine.optimizer_step_count)
    config = config_of(shards, directory / "hopeless", on_nonfinite="skip", steps=30, save_every=5)  # saves end no row
    with open_trainer(config, groups, torch.device("cpu")) as trainer:
        _poison(trainer, set(range(4, 31)))
        with pytest.raises(TrainingError, match="11 such steps"):
            trainer.fit()
    config = config_of(shards, directory / "circle", on_nonfinite="rollback", steps=30)
    with open_trainer(config, groups, torch.device("cpu")) as trainer:
        _poison(trainer, {LOST}, again=True)  # two good steps after the checkpoint, and the next is lost, every time
        with pytest.raises(TrainingError, match="11 such steps"):
            trainer.fit()
        return found


@pytest.fixture(scope="module")
def policies(shards, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("policies")
    return directory, run_distributed(_run_policies, 2, str(shards), directory)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_stops_is_skipped_or_is_rolled_back(policies, engine):
    directory, ranks = policies
    per_step = 2  # windows of a rank
    for rank in ranks:
        error, _, _ = rank[f"{engine}-stop"]
        assert f"step {LOST}: loss nan" in error or f"step {LOST}: loss" in error
        assert "step-00000005" in error

        error, windows, applied = rank[f"{engine}-skip"]
        assert error is None
        assert applied == STEPS - 1
        order = [number for step in range(1, STEPS + 1) for number in windows[step]]

        error, again, applied = rank[f"{engine}-rollback"]
        assert error is None
        assert applied == STEPS
        # Back to the weights of step 5, on with the windows after those of step 7.
        assert again[SAVE + 1] == order[LOST * per_step : (LOST + 1) * per_step]
    skipped, rolled = (_losses(directory / f"{engine}-{policy}") for policy in ("skip", "rollback"))
    assert sorted(skipped) == [step for step in range(1, STEPS + 1) if step != LOST]
    assert sorted(rolled) == list(range(1, STEPS + 1))
    assert all(skipped[step] == rolled[step] for step in range(1, SAVE + 1))
    assert rolled[SAVE + 1] != skipped[SAVE + 1]


def test_every_engine_does_the_same(policies):
    directory, _ = policies
    for policy in ("skip", "rollback"):
        first, *others = (_losses(directory / f"{engine}-{policy}") for engine in ENGINES)
        worst = max(abs(other[step] - first[step]) / first[step] for other in others for step in first)
        print(f"{policy}: engines differ by {worst:.1e}, limit 1e-5")
        assert worst < 1e-5


WARMUP = [{"seq_len": 16 << n, "steps": 3} for n in range(6)]  # 16 ... 512, then 1024


def _run_until_stopped(config: Config, stop_at: int) -> dict[str, Any]:
    """A run that gets a SIGTERM while it computes step `stop_at`; 0: none."""
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        windows = _record_windows(trainer)
        take = trainer.objective.curriculum.take

        def signalled() -> Any:
            if trainer.status.step + 1 == stop_at and trainer.groups.world.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return take()

        trainer.objective.curriculum.take = signalled  # type: ignore[method-assign]
        reason = trainer.fit()
        return {"reason": reason, "step": trainer.status.step, "windows": windows}


def _warmup_runs(shards: str, directory: Path) -> dict[str, Any]:
    logging.disable(logging.INFO)
    long = config_of(shards, directory / "whole", steps=24, save_every=0, seq_len_warmup=WARMUP, global_batch_size=2)
    long = replace(long, model=replace(long.model, max_seq_len=1024), data=replace(long.data, seq_len=1024))
    whole = _run_until_stopped(long, 0)
    cut = replace(long, train=replace(long.train, run_dir=str(directory / "cut")))
    parts = [_run_until_stopped(cut, 3 * stage + 2) for stage in range(7)]
    parts.append(_run_until_stopped(cut, 0))
    return {"whole": whole, "parts": parts}


def test_a_length_warmup_cut_in_each_of_seven_stages(shards, tmp_path):
    ranks = run_distributed(_warmup_runs, 2, str(shards), tmp_path)
    for rank in ranks:
        parts, whole = rank["parts"], rank["whole"]
        assert [part["reason"] for part in parts] == ["SIGTERM"] * 7 + [None]
        ends = [part["step"] for part in parts]
        assert ends == sorted(ends)
        # The flag of a step is read one step later.
        assert all(3 * stage + 2 <= end <= 3 * stage + 3 for stage, end in enumerate(ends[:-1])), ends
        windows = {step: taken for part in parts for step, taken in part["windows"].items()}
        assert windows == whole["windows"]
    rows = [[(row.step, row.seq_len, row.tokens, row.loss) for row in read_rows(tmp_path / run / "metrics.jsonl")
             if row.split == "train"] for run in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert [row[1] for row in rows[0]] == [16 << min(step // 3, 6) for step in range(24)]
    assert rows[0][-1][2] == sum(2 * 3 * (16 << n) for n in range(6)) + 2 * 6 * 1024
    assert not requeue_marker(tmp_path / "cut").exists(), "a finished run is not to be requeued"


def test_a_stop_request_is_a_checkpoint_and_a_marker(shards, tmp_path):
    config = config_of(str(shards), tmp_path / "run", eval_every=4, save_every=0)
    for rank in run_distributed(_run_until_stopped, 2, config, 4):
        assert rank["reason"] == "SIGTERM"
    step = rank["step"]
    marker = json.loads(requeue_marker(tmp_path / "run").read_text())
    assert (marker["signal"], marker["step"]) == ("SIGTERM", step)
    assert latest(tmp_path / "run" / "checkpoints").name == f"step-{step:08d}"
    run_distributed(_run_until_stopped, 2, config, 0)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row.step for row in rows if row.split == "val"] == [4, 8, 12], "the stop cut one off"
    assert [row.step for row in rows if row.split == "train"] == list(range(1, STEPS + 1))
    assert len(stages(config, data_ranks=2)) == 1


def _stop_in_validation(config: Config) -> dict[str, Any]:
    """A run whose first rank gets a SIGTERM in the validation after step 4."""
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        watched, batches = trainer._watched, []

        def signalled(coming: Any) -> Any:
            for batch in watched(coming):
                if trainer.status.step == 4:
                    batches.append(batch)
                    if len(batches) == 2 and trainer.groups.world.rank == 0:
                        os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        trainer._watched = signalled  # type: ignore[method-assign]
        return {"reason": trainer.fit(), "step": trainer.status.step, "batches": len(batches)}


def test_a_stop_in_a_validation_gives_it_up_and_the_resume_makes_up_for_it(shards, tmp_path):
    config = config_of(str(shards), tmp_path / "run", eval_every=4, save_every=0, steps=8)
    for rank in run_distributed(_stop_in_validation, 2, config):
        assert (rank["reason"], rank["step"]) == ("SIGTERM", 4)
        assert rank["batches"] <= 4, "the validation went on"
    saved = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert read_metadata(saved)["val_loss"] is None
    run_distributed(_run_until_stopped, 2, config, 0)
    rows = {row.step: row.loss for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.split == "val"}
    assert sorted(rows) == [4, 8]
    assert read_metadata(saved)["val_loss"] == rows[4], "the best checkpoint is chosen by it"


def _save_fails(config: Config) -> str:
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        take = trainer.objective.curriculum.take

        def signalled() -> Any:
            if trainer.status.step == 3:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # stands for a full disk: no checkpoint fits
                os.kill(os.getpid(), signal.SIGUSR1)
            return take()

        trainer.objective.curriculum.take = signalled  # type: ignore[method-assign]
        with pytest.raises(TrainingError, match="could not be written") as failure:
            trainer.fit()
        return str(failure.value)


def test_a_stop_that_could_not_save_is_a_failure_without_marker(shards, tmp_path):
    config = config_of(str(shards), tmp_path / "run", save_every=0)
    assert "none was saved yet" in run_distributed(_save_fails, 1, config)[0]
    assert not requeue_marker(tmp_path / "run").exists()


def _refused(config: Config) -> None:
    with pytest.raises(UserError, match="manifest"):
        with open_trainer(config, init_groups(), torch.device("cpu")):
            pass


def test_a_refused_start_changes_nothing_and_a_start_from_elsewhere_resumes(shards, tmp_path, tmp_path_factory):
    config = config_of(str(shards), tmp_path / "run", save_every=0)
    run_distributed(_run_until_stopped, 1, config, 4)
    run_dir = tmp_path / "run"
    before = {name: (run_dir / name).read_text() for name in ("config.yaml", "requeue.json")}
    other = tmp_path_factory.mktemp("other") / "shards"
    assert build_shards([str(SAMPLE / "phix174.fa.gz"), "--val-fraction", "0.1", "--out", str(other)]) == 0
    run_distributed(_refused, 1, replace(config, data=replace(config.data, shards=str(other))))
    assert {name: (run_dir / name).read_text() for name in before} == before

    start = latest(run_dir / "checkpoints")
    away = replace(config, train=replace(config.train, run_dir=str(tmp_path / "away"), resume=str(start)))
    stopped = run_distributed(_run_until_stopped, 1, away, 8)[0]
    assert stopped["step"] >= 8
    finished = run_distributed(_run_until_stopped, 1, away, 0)[0]  # the same command
    assert (finished["reason"], min(finished["windows"])) == (None, stopped["step"] + 1)
