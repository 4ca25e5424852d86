"""kill -9 of a random rank, or of all, at random moments of a run that saves all the time: nothing is lost or torn."""

import logging
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from tests.dist.harness import fork_server, rank_main, run_distributed

RANKS, STEPS = 2, 4000
PEER_SECONDS = 20
"""A rank whose peer was killed has ended by then: gloo tells it, or the watchdog does after some 6 s."""


def config_of(shards: Path, run_dir: Path) -> Config:
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.1),
        data=DataSection(shards=str(shards), seq_len=64, num_workers=0),
        train=TrainSection(run_dir=str(run_dir), steps=STEPS, micro_batch_size=1, global_batch_size=2, eval_every=0,
                           save_every=2),
        optim=OptimSection(lr=2e-3, warmup_steps=2))


def _train(config: Config, windows_dir: Path, stop_after: int) -> None:
    """A run that writes down each step's windows as it takes them; it stops itself after some steps, 0: never."""
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        take = trainer.objective.curriculum.take

        def recorded() -> Any:
            step = trainer.status.step + 1
            stage, batches = take()
            with (windows_dir / f"rank-{trainer.groups.world.rank}").open("a") as file:
                file.write(f"{step} {[int(window) for batch in batches for window in batch.windows]}\n")
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return stage, batches

        trainer.objective.curriculum.take = recorded  # type: ignore[method-assign]
        logging.disable(logging.INFO)
        trainer.fit()


def _windows(directory: Path) -> dict[str, set[str]]:
    """By rank and step, all that were ever taken."""
    found: dict[str, set[str]] = {}
    for path in directory.glob("rank-*"):
        for line in path.read_text().splitlines():
            step, _, windows = line.partition(" ")
            if windows.endswith("]"):  # the last line of a killed rank may be cut
                found.setdefault(f"{path.name} step {step}", set()).add(windows)
    return found


def _losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.loss for row in read_rows(run_dir / "metrics.jsonl") if row.split == "train"}


def _live_and_die(config: Config, windows_dir: Path, draw: random.Random, *, everyone: bool) -> str:
    """Start the run, kill one rank or all a random time after it took a new step, and wait for the end of all."""
    with tempfile.TemporaryDirectory() as store:
        ranks = [fork_server().Process(target=rank_main, args=(_train, rank, RANKS, store, 300.0,
                                                               (config, windows_dir, 0))) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        progress = windows_dir / "rank-0"
        size, deadline = progress.stat().st_size if progress.exists() else 0, time.monotonic() + 120
        while not progress.exists() or progress.stat().st_size == size:
            assert all(process.is_alive() for process in ranks), "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.8))
        victims = ranks if everyone else [draw.choice(ranks)]
        for process in victims:
            process.kill()
        killed = time.monotonic()
        for process in ranks:
            process.join(PEER_SECONDS)
            assert not process.is_alive(), f"a rank hung {PEER_SECONDS} s after its peer was killed"
        return f"killed {len(victims)} of {RANKS} ranks; all had ended after {time.monotonic() - killed:.1f} s"


def _check(kills: int, shards: Path, directory: Path) -> None:
    draw = random.Random(kills)
    for name in ("cut", "whole"):
        (directory / f"windows-{name}").mkdir()
    cut = config_of(shards, directory / "cut")
    for kill in range(kills):
        end = _live_and_die(cut, directory / "windows-cut", draw, everyone=kill % 3 == 0)
        print(f"kill {kill + 1}: {end}, "
              f"at step {max(_losses(directory / 'cut'), default=0)}")
    reached = max(_losses(directory / "cut"), default=0) + 5
    assert reached < STEPS - 10
    for name in ("cut", "whole"):
        run_distributed(_train, RANKS, config_of(shards, directory / name), directory / f"windows-{name}", reached)
    found, expected = _losses(directory / "cut"), _losses(directory / "whole")
    common = range(1, reached + 1)
    assert [found[step] for step in common] == [expected[step] for step in common], "losses differ"
    seen, right = _windows(directory / "windows-cut"), _windows(directory / "windows-whole")
    assert all(seen[key] == right[key] for key in right.keys() & seen.keys()), "a step had other windows in some life"
    assert len(right.keys() & seen.keys()) >= RANKS * reached
    said = "".join(path.read_text() for path in (directory / "cut" / "logs").iterdir())
    assert "is passed over" not in said, "a torn checkpoint had a checkpoint's name"
    print(f"{kills} kills over {reached} steps: losses and windows of every step as without")


def test_five_kills(shards, tmp_path):
    _check(5, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_kills(shards, tmp_path):
    _check(50, shards, tmp_path)
