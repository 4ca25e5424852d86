"""What a run says of itself: metrics.jsonl of any past, TensorBoard after clocks that jump, W&B, progress."""

import dataclasses
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hyena_dist.cli.pretrain import main as pretrain
from hyena_dist.config.errors import ConfigError
from hyena_dist.train.laps import WARM_STEPS, SteadyRate
from hyena_dist.train.metrics import METRICS, Metrics, Row, elapsed, read_rows
from hyena_dist.train.progress import RunProgress
from hyena_dist.train.report import write_report
from hyena_dist.train.weights_and_biases import check_installed

LINE = {"step": 1, "split": "train", "loss": 1.0, "perplexity": 2.7, "tokens": 4, "seq_len": 4, "lr": 0.1,
        "grad_norm": 1.0, "tokens_per_second": 5.0, "peak_memory_bytes": 1, "time": 1e9}


def row(step: int, loss: float = 1.0) -> Row:
    return Row(**{**LINE, "step": step, "loss": loss})


def write(run_dir: Path, *steps: int, last_step: int, loss: float = 1.0) -> None:
    metrics = Metrics(run_dir, last_step=last_step, total_steps=10, now=time.time())
    for step in steps:
        metrics.write(dataclasses.replace(row(step, loss), time=time.time()))
    metrics.close()


@pytest.mark.parametrize("strange", [
    b"\xff\xfe not a row", b"", b"null", b"[1]", b"[" * 100_000, b'{"step": "2"}', b'{"step": 2}',
    b'{"step": 99, "note": "mine"}', json.dumps({**LINE, "step": True}).encode(),
    json.dumps({**LINE, "loss": "1.0"}).encode(), json.dumps({**LINE, "split": "test"}).encode(),
    json.dumps({**LINE, "step": 2.0}).encode(),
    json.dumps(LINE).encode()[:-1] + b"\x80}"])
def test_a_line_that_is_no_row_is_kept_as_it_is(tmp_path: Path, strange: bytes,
                                                caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 2, 3, last_step=0)
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, strange, second, third]) + b"\n")
    write(tmp_path, 3, last_step=2, loss=5.0)
    lines = path.read_bytes().splitlines()
    assert lines[:3] == [first, strange, second]
    with caplog.at_level(logging.WARNING):
        assert [(read.step, read.loss) for read in read_rows(path)] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert "left out 1 lines that are no rows of metrics; the first is line 2" in caplog.text


def test_a_row_of_a_newer_version_is_kept_and_dropped_as_any_other(tmp_path: Path) -> None:
    newer = [json.dumps({**LINE, "step": step, "loss": 1, "of_a_newer_version": 3}).encode() for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(newer) + b"\n")
    write(tmp_path, 3, last_step=2, loss=5.0)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2] == newer[:2]
    assert [(read.step, read.loss) for read in read_rows(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 1.0), (3, 5.0)]


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, last_step=0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    write(tmp_path, last_step=2)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    write(tmp_path, last_step=2)
    assert path.read_bytes() == whole, "only its end was missing"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_metrics_that_are_no_file(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics.jsonl: cannot be read .it is no regular file but a .*: make it a"):
        write(tmp_path, 1, last_step=0)


def test_a_row_has_its_extras_beside_its_fields(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, last_step=0, total_steps=10, now=0.0)
    written = dataclasses.replace(row(1), extras={"mfu": 0.25, "steady_tokens_per_second": 4.0})
    metrics.write(written)
    metrics.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {**LINE, "scored": None, "epoch": None, "mfu": 0.25, "steady_tokens_per_second": 4.0}
    assert read_rows(tmp_path / "metrics.jsonl") == [written]
    with pytest.raises(AssertionError):  # what is not declared in METRICS would be drawn without a unit
        metrics.write(dataclasses.replace(row(2), extras={"unheard_of": 1.0}))


def test_every_field_that_is_a_number_of_its_own_is_a_metric() -> None:
    names = {metric.name for metric in METRICS}
    fields = {field.name for field in dataclasses.fields(Row)}
    assert fields - names == {"step", "split", "tokens", "time", "extras"}, "an axis, a key, or not a number"


@pytest.mark.parametrize("loss", [800.0, 1e300])
def test_a_perplexity_beyond_floats_is_null_in_the_file_and_nothing_fails(tmp_path: Path, loss: float) -> None:
    metrics = Metrics(tmp_path, last_step=0, total_steps=10, now=0.0)
    for split in ("train", "val"):
        metrics.write(dataclasses.replace(row(1, loss), split=split, perplexity=math.inf, grad_norm=1e200))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["perplexity"] for line in lines] == [None, None]
    assert [read.perplexity for read in read_rows(tmp_path / "metrics.jsonl")] == [math.inf, math.inf]
    assert "perplexity" not in board(tmp_path).Tags()["scalars"]
    assert write_report(tmp_path) is not None


def board(run_dir: Path, split: str = "train") -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard" / split), size_guidance={"scalars": 0})
    found.Reload()
    return found


def curve(run_dir: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(run_dir).Scalars("loss")]


def at(monkeypatch: pytest.MonkeyPatch, clock: float) -> None:
    monkeypatch.setattr(time, "time", lambda: clock)


CLOCKS = [(2e9, 1e9, 1.5e9, 1.5e9), (1e9, 1e9, 1e9, 1e9), (1e9, 2e9, 3e9, 1e8), (1e9, 1e9 + 1, 1e9, 1e9 + 1)]


@pytest.mark.parametrize("clocks", CLOCKS)
def test_tensorboard_shows_one_curve_after_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            clocks: tuple[float, ...]) -> None:
    """Each start goes on after step 2 of the one before, whose steps 3 and 4 are lost; a reader that is open all the
    time sees the same as one that comes at the end."""
    (tmp_path / "tensorboard" / "train").mkdir(parents=True)
    watching = EventAccumulator(str(tmp_path / "tensorboard" / "train"), size_guidance={"scalars": 0})
    for start, clock in enumerate(clocks):
        at(monkeypatch, clock)
        write(tmp_path, *((1, 2, 3, 4) if start == 0 else (3, 4)), last_step=2 if start else 0, loss=float(start))
        watching.Reload()
    last = float(len(clocks) - 1)
    assert curve(tmp_path) == [(1, 0.0), (2, 0.0), (3, last), (4, last)]
    assert [(event.step, event.value) for event in watching.Scalars("loss")] == curve(tmp_path)
    times = [event.wall_time for event in board(tmp_path).Scalars("loss")]
    assert times == sorted(times)
    assert len(list((tmp_path / "tensorboard" / "train").iterdir())) == len(clocks), "no file is lost"


def test_a_clock_set_back_would_show_the_lost_steps_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: files as they are named by their clocks, and times as they are told."""
    monkeypatch.setattr("hyena_dist.train.board._NAME", re.compile("none of them"))
    monkeypatch.setattr("hyena_dist.train.metrics.SteadyClock.of", lambda _self, time: time)
    for start, clock in enumerate((2e9, 1e9)):
        at(monkeypatch, clock)
        write(tmp_path, *((1, 2, 3, 4) if start == 0 else (3, 4)), last_step=2 if start else 0, loss=float(start))
    assert [value for _, value in curve(tmp_path)] == [0.0, 0.0, 0.0, 0.0]


def test_a_clock_that_is_set_back_while_a_run_goes_on(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, last_step=0, total_steps=10, now=1000.0)
    for step, now in enumerate((1000.0, 1010.0, 400.0, 410.0, 900.0, 100.0), start=1):
        metrics.write(dataclasses.replace(row(step), time=now))
    metrics.close()
    assert [event.wall_time for event in board(tmp_path).Scalars("loss")] == [1000, 1010, 1010, 1020, 1510, 1510]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [read.time for read in rows] == [1000, 1010, 400, 410, 900, 100], "as the clock told"
    assert elapsed(rows) == [0, 10, 10, 20, 510, 510]


def test_training_and_validation_share_their_charts_and_the_table_has_the_settings(tmp_path: Path) -> None:
    settings = {"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "train": {"steps": 10, "precision": "bf16", "x": None}}
    for last_step in (0, 1):  # a resume writes them again
        metrics = Metrics(tmp_path, last_step=last_step, total_steps=10, now=5.0, settings=settings)
        metrics.write(dataclasses.replace(row(last_step + 1), scored=7, extras={"mfu": 0.5}, epoch=0.5))
        metrics.write(dataclasses.replace(row(last_step + 1, 3.0), split="val", lr=None))
        metrics.close()
    tags = {split: set(board(tmp_path, split).Tags()["scalars"]) for split in ("train", "val")}
    assert tags["train"] == {"loss", "perplexity", "grad_norm", "lr", "tokens_per_second", "mfu", "peak_memory_bytes",
                             "seq_len", "scored", "epoch"}
    assert tags["val"] == tags["train"] - {"lr", "mfu", "scored", "epoch"}
    assert [event.value for event in board(tmp_path, "val").Scalars("loss")] == [3.0, 3.0]
    table = board(tmp_path, ".").PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(table["_hparams_/session_start_info"]).session_start_info
    assert {key: value.number_value or value.string_value for key, value in start.hparams.items()} == {
        "optim.lr": 1e-3, "optim.betas": "(0.9, 0.95)", "train.steps": 10.0, "train.precision": "bf16",
        "train.x": "null"}
    experiment = HParamsPluginData.FromString(table["_hparams_/experiment"]).experiment
    assert [(info.name.group, info.name.tag) for info in experiment.metric_infos] == [("val", "loss"),
                                                                                      ("val", "perplexity")]


def test_wandb_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("hyena_dist.train.weights_and_biases.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"train.wandb=mine: wandb is missing: .* pip install 'hyena-dist\[wandb\]'"):
        Metrics(tmp_path, last_step=0, total_steps=10, now=0.0, wandb="mine")
    check_installed("")


def test_wandb_that_is_missing_ends_the_command_before_anything_is_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("hyena_dist.train.weights_and_biases.find_spec", lambda _: None)
    assert pretrain(["--config", "configs/quickstart.yaml", f"train.run_dir={tmp_path / 'run'}",
                     "train.wandb=mine"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: train.wandb=mine: wandb is missing: install it with pip install")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = Metrics(tmp_path, last_step=0, total_steps=10, now=0.0, settings={"a": {"b": 7}}, wandb="mine")
    metrics.write(dataclasses.replace(row(1, 1.25), extras={"mfu": 0.5}))
    metrics.write(dataclasses.replace(row(1, 2.5), split="val"))
    metrics.close()
    metrics.close_wandb()
    wandb.teardown()  # its own process may write the end of the log a moment later
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for text in (b"train/loss", b"1.25", b"train/mfu", b"0.5", b"val/loss", b"2.5", b"a.b"):
        assert text in content, text


def test_a_steady_rate_is_without_the_first_steps_of_a_stage_and_what_lies_between_steps() -> None:
    rate = SteadyRate()
    assert [rate.add(stage=0, tokens=100, seconds=50.0) for _ in range(WARM_STEPS)] == [None] * WARM_STEPS
    assert rate.add(stage=0, tokens=100, seconds=2.0) == 50.0
    assert rate.add(stage=0, tokens=100, seconds=6.0) == 25.0
    assert rate.add(stage=1, tokens=100, seconds=9.0) is None


def test_a_validation_without_a_terminal_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 10_000))
    monkeypatch.setattr("hyena_dist.train.progress.time.monotonic", lambda: next(clock))
    progress = RunProgress(0, 10)
    with caplog.at_level(logging.INFO):
        assert list(progress.validating(range(100))) == list(range(100))
        assert 3 <= len(caplog.records) <= 8, caplog.text
        assert "validation: batch 15/100" in caplog.text
        caplog.clear()
        list(progress.validating(range(5)))
        assert not caplog.records, "a short one says nothing"
    progress.close()
