"""Windows without a base to score: a step of nothing else changes nothing, under every engine, and says so."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.data.tokenizer import N
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from hyena_dist.train.trainer import Trainer
from tests import genomes
from tests.dist.harness import run_distributed
from tests.dist.test_lost_steps import config_of
from tests.dist.toy import state_of

ENGINES = {f"zero{stage}": EngineSection(zero_stage=stage) for stage in range(4)} | {"fsdp": EngineSection(name="fsdp")}
STEPS, EMPTY, HALF = 6, 4, 5
"""Step EMPTY has only N on both ranks; step HALF on rank 1 alone."""


def _with_gaps(trainer: Trainer, scored: int) -> None:
    take = trainer.objective.curriculum.take

    def gaps() -> Any:
        step = trainer.status.step + 1
        stage, batches = take()
        if step == EMPTY or (step == HALF and trainer.groups.world.rank == 1):
            batches = [batch._replace(ids=torch.full_like(batch.ids, N), scored=scored) for batch in batches]
        return stage, batches

    trainer.objective.curriculum.take = gaps  # type: ignore[method-assign]


def _train(config: Config, scored: int = 0) -> dict[str, Any]:
    """A run, and its state before and after the step without a base, whose batches say that they have some."""
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        _with_gaps(trainer, scored)
        states, step, said = {}, trainer._train_step, []

        def recorded() -> None:
            if trainer.status.step + 1 == EMPTY:
                states["before"] = state_of(trainer.engine)
            step()
            if trainer.status.step == EMPTY:
                states["after"] = state_of(trainer.engine)

        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("hyena_dist.train.trainer").addHandler(handler)
        trainer._train_step = recorded  # type: ignore[method-assign]
        trainer.fit()
        logging.getLogger("hyena_dist.train.trainer").removeHandler(handler)
        before, after = states["before"], states["after"]
        moved = max(float((before[key] - after[key]).abs().max()) for key in before if key != "steps")
        return {"moved": moved, "steps": after["steps"] - before["steps"],
                "applied": trainer.engine.optimizer_step_count,
                "said": [line for line in said if "no base to score" in line]}


def _on_each_rank(shards: str, directory: Path) -> dict[str, Any]:
    found = {}
    for name, engine in ENGINES.items():
        config = config_of(shards, directory / name, steps=STEPS, save_every=0, eval_every=STEPS)
        found[name] = _train(dataclasses.replace(config, engine=engine))
    config = config_of(shards, directory / "control", steps=EMPTY, save_every=0)
    found["control"] = _train(config, scored=1)  # the control: batches without a base that say they have one
    return found


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("unscored")
    return directory, run_distributed(_on_each_rank, 2, str(shards), directory)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_base_changes_nothing_and_says_so(runs, engine):
    directory, ranks = runs
    for rank in ranks:
        print(f"{engine}: weights and moments moved by {rank[engine]['moved']}")
        assert rank[engine]["moved"] == 0.0
        assert rank[engine]["steps"] == 0
        assert rank[engine]["applied"] == STEPS - 1
        assert rank[engine]["said"] == [f"step {EMPTY}: its windows have no base to score (A, C, G, T): nothing was "
                                        "changed"]
    rows = read_rows(directory / engine / "metrics.jsonl")
    train = {row.step: row for row in rows if row.split == "train"}
    assert sorted(train) == [step for step in range(1, STEPS + 1) if step != EMPTY]
    assert all(row.loss > 1 and row.scored is not None for row in rows)
    assert train[HALF].scored < 0.6 * train[1].scored  # bases of one rank only
    assert train[STEPS].tokens == STEPS * train[1].tokens
    [validation] = [row for row in rows if row.split == "val"]
    assert 9000 < validation.scored < 10081  # the bases held out, but for the first of each window's row


def test_control_momentum_and_decay_would_move_the_weights(runs):
    for rank in runs[1]:
        print(f"unguarded, they moved by {rank['control']['moved']}")
        assert rank["control"]["moved"] > 1e-5
        assert rank["control"]["said"] == []


def _train_on(shards: str, run_dir: Path) -> int:
    config = config_of(shards, run_dir, steps=12, save_every=0)
    with open_trainer(config, init_groups(), torch.device("cpu")) as trainer:
        trainer.fit()
        return trainer.engine.optimizer_step_count


def test_a_genome_of_gaps_has_no_rows_of_loss_0(tmp_path):
    """Ten windows of N to each of bases, one window a step."""
    manifest = genomes.shards(tmp_path, {"chr1": genomes.sequence(np.random.default_rng(0),
                                                                 400) + b"N" * 6000})
    [applied] = run_distributed(_train_on, 1, str(manifest.directory), tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.split == "train"]
    assert len(rows) == applied < 12
    assert all(row.loss > 0.5 and row.scored for row in rows)
