"""What a run does about steps that are not finite, about stop requests, and at the ends of its length stages."""

import json
import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.config.errors import TrainingError
from hyena_dist.config.schema import Config, DataSection, EngineSection, ModelSection, OptimSection, TrainSection
from hyena_dist.config.warmup import stages
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.checkpoint import find_latest
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.signals import requeue_marker
from hyena_dist.train.trainer import Trainer
from tests.dist.harness import run_distributed

ENGINES = {"zero0": EngineSection(zero_stage=0), "zero2": EngineSection(zero_stage=2),
           "zero3": EngineSection(zero_stage=3), "fsdp": EngineSection(name="fsdp")}
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
    take = trainer.curriculum.take

    def recorded() -> Any:
        step = trainer.step + 1
        stage, batches = take()
        taken[step] = [int(window) for batch in batches for window in batch.windows]
        return stage, batches

    trainer.curriculum.take = recorded  # type: ignore[method-assign]
    return taken


def _poison(trainer: Trainer, steps: set[int]) -> None:
    """The gradients of the last micro-batch of these steps are nan on the last rank, once each."""
    backward, calls = trainer.engine.backward, []

    def poisoned(loss: torch.Tensor) -> None:
        calls.append(trainer.step + 1)
        hit = (trainer.step + 1 in steps and calls.count(trainer.step + 1) == trainer.engine.accumulation_steps
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
            trainer = Trainer(config, groups, torch.device("cpu"))
            windows = _record_windows(trainer)
            _poison(trainer, {LOST})
            try:
                trainer.fit()
                error = None
            except TrainingError as failure:
                error = str(failure)
            found[f"{engine_name}-{policy}"] = (error, windows, trainer.engine.optimizer_step_count)
    config = config_of(shards, directory / "hopeless", on_nonfinite="skip", steps=30, save_every=0)
    trainer = Trainer(config, groups, torch.device("cpu"))
    _poison(trainer, set(range(4, 31)))
    with pytest.raises(TrainingError, match="11 times in a row"):
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


WARMUP = [{"seq_len": 64 << n, "steps": 3} for n in range(6)]  # 64 ... 2048, then 4096


def _run_until_stopped(config: Config, stop_at: int) -> dict[str, Any]:
    """A run that gets a SIGTERM while it computes step `stop_at`; 0: none."""
    trainer = Trainer(config, init_groups(), torch.device("cpu"))
    windows = _record_windows(trainer)
    take = trainer.curriculum.take

    def signalled() -> Any:
        if trainer.step + 1 == stop_at and trainer.groups.world.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    trainer.curriculum.take = signalled  # type: ignore[method-assign]
    reason = trainer.fit()
    return {"reason": reason, "step": trainer.step, "windows": windows}


def _warmup_runs(shards: str, directory: Path) -> dict[str, Any]:
    logging.disable(logging.INFO)
    long = config_of(shards, directory / "whole", steps=24, save_every=0, seq_len_warmup=WARMUP, global_batch_size=2)
    long = replace(long, model=replace(long.model, max_seq_len=4096), data=replace(long.data, seq_len=4096))
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
    assert [row[1] for row in rows[0]] == [64 << min(step // 3, 6) for step in range(24)]
    assert rows[0][-1][2] == sum(2 * 3 * (64 << n) for n in range(6)) + 2 * 6 * 4096
    assert not requeue_marker(tmp_path / "cut").exists(), "a finished run is not to be requeued"


def test_a_stop_request_is_a_checkpoint_and_a_marker(shards, tmp_path):
    config = config_of(str(shards), tmp_path / "run", eval_every=4, save_every=0)
    for rank in run_distributed(_run_until_stopped, 2, config, 4):
        assert rank["reason"] == "SIGTERM"
    step = rank["step"]
    marker = json.loads(requeue_marker(tmp_path / "run").read_text())
    assert (marker["signal"], marker["step"]) == ("SIGTERM", step)
    assert find_latest(tmp_path / "run" / "checkpoints").name == f"step-{step:08d}"
    run_distributed(_run_until_stopped, 2, config, 0)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row.step for row in rows if row.split == "val"] == [4, 8, 12], "the stop cut one off"
    assert [row.step for row in rows if row.split == "train"] == list(range(1, STEPS + 1))
    assert len(stages(config, data_ranks=2)) == 1
