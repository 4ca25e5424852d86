"""metrics.jsonl of any past, and TensorBoard's curves after clocks that jump."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyena_dist.train.metrics import Metrics, Row, read_rows

LINE = {"step": 1, "split": "train", "loss": 1.0, "perplexity": 2.7, "tokens": 4, "seq_len": 4, "lr": 0.1,
        "grad_norm": 1.0, "tokens_per_second": 5.0, "mfu": None, "bandwidth": None, "peak_memory_bytes": 1}


def row(step: int, loss: float = 1.0) -> Row:
    return Row(**{**LINE, "step": step, "loss": loss})


def write(run_dir: Path, *steps: int, last_step: int, loss: float = 1.0) -> None:
    metrics = Metrics(run_dir, last_step=last_step, total_steps=10)
    for step in steps:
        metrics.write(row(step, loss))
    metrics.close()


@pytest.mark.parametrize("strange", [
    b"\xff\xfe not a row", b"", b"null", b"[1]", b"[" * 100_000, b'{"step": "2"}', b'{"step": 2}',
    json.dumps({**LINE, "step": True}).encode(), json.dumps({**LINE, "loss": "1.0"}).encode(),
    json.dumps({**LINE, "split": "test"}).encode(), json.dumps({**LINE, "step": 2.0}).encode(),
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


def curve(run_dir: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


@pytest.mark.parametrize("clocks", [(2e9, 1e9, 1.5e9, 1.5e9), (1e9, 1e9, 1e9, 1e9), (1e9, 2e9, 3e9, 1e8),
                                    (1e9, 1e9 + 1, 1e9, 1e9 + 1)])
def test_tensorboard_shows_one_curve_after_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            clocks: tuple[float, ...]) -> None:
    """Each start goes on after step 2 of the one before, whose steps 3 and 4 are lost. Containers have one host's name
    and one process number, so that only the time tells the files apart."""
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.os.getpid", lambda: 1)
    uid = "tensorboard.summary.writer.event_file_writer._global_uid"
    for start, clock in enumerate(clocks):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        monkeypatch.setattr(f"{uid}.get", lambda: 0)
        write(tmp_path, *((1, 2, 3, 4) if start == 0 else (3, 4)), last_step=2 if start else 0, loss=float(start))
    last = float(len(clocks) - 1)
    assert curve(tmp_path) == [(1, 0.0), (2, 0.0), (3, last), (4, last)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(clocks), "no file is lost"


def test_a_clock_set_back_shows_the_lost_steps_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: files as they are named by their clocks."""
    monkeypatch.setattr("hyena_dist.train.metrics._put_behind", lambda *_: None)
    for start, clock in enumerate((2e9, 1e9)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        write(tmp_path, *((1, 2, 3, 4) if start == 0 else (3, 4)), last_step=2 if start else 0, loss=float(start))
    assert [value for _, value in curve(tmp_path)] == [0.0, 0.0, 0.0, 0.0]
