"""train.profile: a trace and a table of a few steps, and nothing where it is off."""

import json
import logging

import torch

from hyena_dist.train.profile import WARMUP_STEPS, StepProfiler


def train(profiler: StepProfiler, steps: int) -> None:
    """Every step multiplies; the first ones take a sine, those after the third a cosine."""
    x = torch.randn(8, 8)
    with profiler:
        for step in range(steps):
            x @ x
            if step < WARMUP_STEPS:
                x.sin()
            if step > WARMUP_STEPS:
                x.cos()
            profiler.step()


def test_the_steps_after_the_warm_up_are_traced(tmp_path):
    train(StepProfiler(tmp_path, 1, rank=3), 6)
    table = (tmp_path / "profile" / "rank-3.txt").read_text()
    assert "Self CPU %" in table
    assert "aten::mm" in table
    names = [event["name"] for event in json.loads((tmp_path / "profile" / "rank-3.json").read_text())["traceEvents"]]
    assert names.count("aten::mm") == 1
    assert "aten::sin" not in table + str(names), "the warm-up"
    assert "aten::cos" not in table + str(names), "what comes after"
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_a_run_that_ends_early_has_the_steps_that_it_made(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(StepProfiler(tmp_path, 10, rank=0), 4)
    assert "ended 8 steps before the trace was complete" in caplog.text
    assert "aten::mm" in (tmp_path / "profile" / "rank-0.txt").read_text()


def test_off_it_makes_no_tracer(tmp_path, monkeypatch):
    monkeypatch.setattr("hyena_dist.train.profile.profile", None)
    train(StepProfiler(tmp_path, 0, rank=0), 4)
    assert list(tmp_path.iterdir()) == []
