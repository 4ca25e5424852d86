"""train.max_hours: the run saves and stops before its time is up, where no signal comes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.parallel.groups import Axis, init_groups
from hyena_dist.runtime import stop as stop_module
from hyena_dist.runtime.signals import TIME_IS_UP
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.session import open_trainer
from tests.checkpoints import latest
from tests.dist.harness import run_distributed
from tests.dist.test_killed import config_of

STEPS = 40

def _run(shards: Path, run_dir: Path, kind: str) -> tuple[str | None, int]:
    """Why and after which step a run stopped whose second rank alone finds that the time is up, in a step or in a
    validation."""
    config = config_of(shards, run_dir)
    train = replace(config.train, steps=STEPS, max_hours=None if kind == "none" else 1000.0,
                    eval_every=5 if kind == "validation" else 0, save_every=0)
    groups = init_groups()
    with open_trainer(replace(config, train=train), groups, torch.device("cpu")) as trainer:
        if groups.world.rank == 1:
            up = 3600 * 1000.0
            if kind == "validation":
                validate = trainer.objective.validate

                def late(module: Any, watched: Any) -> Any:
                    if trainer.status.step:
                        stop_module.STARTED -= up  # type: ignore[misc]
                    return validate(module, watched)

                trainer.objective.validate = late  # type: ignore[method-assign]
            elif kind == "step":
                stop_module.STARTED -= up  # type: ignore[misc]
        reason = trainer.fit()
        if groups.world.rank == 1 and kind != "none":
            stop_module.STARTED += up  # type: ignore[misc]
        return reason, trainer.status.step


def _runs(shards: Path, directory: Path) -> dict[str, tuple[str | None, int]]:
    return {kind: _run(shards, directory / kind, kind) for kind in ("step", "validation", "none")}


def test_all_ranks_save_and_stop_when_the_time_of_one_is_up(shards: Path, tmp_path: Path) -> None:
    first, second = run_distributed(_runs, 2, shards, tmp_path)
    print(first)
    assert first == second
    assert first["none"] == (None, STEPS)  # the control
    for kind in ("step", "validation"):
        reason, step = first[kind]
        assert reason == TIME_IS_UP
        assert step == 5 if kind == "validation" else step <= 3
        marker = json.loads((tmp_path / kind / "requeue.json").read_text())
        assert (marker["signal"], marker["step"]) == ("train.max_hours", step)
        saved = latest(tmp_path / kind / "checkpoints")
        assert saved is not None
        assert saved.name == f"step-{step:08d}"
        assert not [row for row in read_rows(tmp_path / kind / "metrics.jsonl") if row.split == "val"]


def test_steps_and_saves_that_take_longer_stop_the_run_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    def stops_at(limit: float, *, step: float, save: float = 0.0) -> float:
        """The second of the program at which it stops, of steps that all take as long."""
        clock = [1000.0]
        monkeypatch.setattr(stop_module, "STARTED", clock[0])
        monkeypatch.setattr(stop_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
        with StopSignal(Axis(), seconds=limit) as stop:
            stop.save_seconds = save
            while stop.agreed() is None:
                clock[0] += step
                assert clock[0] < 1000 + limit
        assert stop.requested == TIME_IS_UP
        return clock[0] - 1000

    assert stops_at(100, step=1) == 90  # a tenth of it is spared
    assert stops_at(36000, step=1) == 36000 - 120  # two minutes at most
    assert stops_at(36000, step=1000) == 34000  # another step of 1000 s would end in time, a slower one would not
    assert stops_at(36000, step=1, save=600) == 36000 - 1202
