"""A signal to one rank stops all ranks, at the same step."""

import json
import os
import select
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hyena_dist.config.errors import ConfigError, TrainingError
from hyena_dist.parallel.groups import Axis, gloo_copy
from hyena_dist.runtime import signals
from hyena_dist.runtime import stop as stop_module
from hyena_dist.runtime.requeue import (
    MOST_STARTS,
    clear_requeue,
    end_alone,
    last_marker,
    note_first_step,
    requeue_marker,
    starts_file,
    take_requeue,
    write_requeue,
)
from hyena_dist.runtime.run_lock import RunLock
from hyena_dist.runtime.signals import EXIT_REQUEUE, PATIENCE, SIGNALS
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.train.run_directory import RunDirectory
from tests.dist.harness import run_distributed
from tests.dist.test_killed import config_of
from tests.dist.test_watchdog import wait_for

FIRST_SIGNAL = 7


def _loop(axis: Axis, rank: int, act: Any, *, seconds: float = 0.002) -> dict[str, Any]:
    """Steps of unequal lengths; `act(stop)` happens on one rank in step 7."""
    before = [signal.getsignal(number) for number in SIGNALS]
    local_first = None
    with StopSignal(axis) as stop:
        for step in range(1, 21):
            time.sleep(seconds * (1 + axis.rank))
            if step == FIRST_SIGNAL and axis.rank == rank:
                act(stop)
            if stop.requested and local_first is None:
                local_first = step
            reason = stop.agreed()
            if reason is not None:
                os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat themselves while a run saves
                os.kill(os.getpid(), signal.SIGUSR1)
                break
        time.sleep(0.01)
        after_second = stop.requested
    restored = before == [signal.getsignal(number) for number in SIGNALS]
    return {"step": step, "reason": reason, "alone": local_first, "after": after_second, "restored": restored}


def _stuck(axis: Axis) -> dict[str, Any]:
    """A signal while the main thread of rank 1 waits in a collective."""
    seen: dict[str, Any] = {}
    main, store = threading.get_ident(), _get_default_store()
    with StopSignal(axis) as stop:
        def look() -> None:
            wait_for(lambda: sys._current_frames()[main].f_code.co_name == "barrier")
            os.kill(os.getpid(), signal.SIGTERM)
            # Python calls no handler of its own: the main thread is in the collective, until the other rank comes.
            wait_for(lambda: stop.requested is not None)
            seen["requested"] = stop.requested
            store.set("has looked", "")

        if axis.rank == 1:
            thread = threading.Thread(target=look)
            thread.start()
        else:
            store.wait(["has looked"])
        dist.barrier(group=axis.group)
        if axis.rank == 1:
            thread.join()
    return seen


def _of_a_child(axis: Axis) -> str | None:
    """A signal to a forked reader process is none to this rank."""
    with StopSignal(axis) as stop:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_SLEEPING)
        os.kill(child, signal.SIGUSR1)
        os.waitpid(child, 0)
        return stop.requested


def _at_once(axis: Axis) -> list[str | None]:
    """What was asked for before the loop is known before its first step."""
    with StopSignal(axis) as stop:
        before = stop.agreed_now()
        if axis.rank == 1:
            stop.request("SIGHUP")
        return [before, stop.agreed_now()]


def _cases() -> dict[str, Any]:
    axis = gloo_copy(Axis.of(dist.group.WORLD))
    found = {
        "SIGTERM": _loop(axis, 1, lambda stop: os.kill(os.getpid(), signal.SIGTERM)),
        "SIGUSR1": _loop(axis, 0, lambda stop: os.kill(os.getpid(), signal.SIGUSR1)),
        "SIGHUP": _loop(axis, 0, lambda stop: os.kill(os.getpid(), signal.SIGHUP)),
        "SIGINT": _loop(axis, 1, lambda stop: os.kill(os.getpid(), signal.SIGINT)),
        "now": _at_once(axis),
        "launcher gone": _loop(axis, 1, lambda stop: stop.request("launcher gone")),
        "nothing": _loop(axis, 1, lambda stop: None),
        "stuck": _stuck(axis),
        "child": _of_a_child(axis),
        "alone": _loop(Axis(), 0, lambda stop: os.kill(os.getpid(), signal.SIGTERM)),
    }
    stop_module._LONG_STEP_MILLISECONDS = 5
    found["long"] = _loop(axis, 1, lambda stop: os.kill(os.getpid(), signal.SIGTERM), seconds=0.02)
    return found


def test_one_signal_stops_every_rank_at_the_same_step() -> None:
    first, second = run_distributed(_cases, 2)
    for reason, signalled in (("SIGTERM", 1), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 1), ("launcher gone", 1)):
        ranks = first[reason], second[reason]
        print(reason, ranks)
        assert [rank["reason"] for rank in ranks] == [reason] * 2
        assert [rank["after"] for rank in ranks][signalled] == reason  # the second signal changed nothing
        assert [rank["step"] for rank in ranks] == [FIRST_SIGNAL + 1] * 2
        assert all(rank["restored"] for rank in ranks)
        # The control: by its own signal alone one rank would have stopped, and the other gone on.
        assert [rank["alone"] for rank in ranks][signalled] == FIRST_SIGNAL
        assert [rank["alone"] for rank in ranks][1 - signalled] is None
    assert first["now"] == second["now"] == [None, "SIGHUP"]
    assert [rank["nothing"]["reason"] for rank in (first, second)] == [None, None]
    # Long steps: the answer is that of the step of the signal.
    assert [rank["long"]["step"] for rank in (first, second)] == [FIRST_SIGNAL] * 2
    assert first["alone"] | {"alone": 7} == {"step": 7, "reason": "SIGTERM", "alone": 7, "after": "SIGTERM",
                                             "restored": True}
    # Another thread sees the signal while Python cannot call its handler.
    assert second["stuck"] == {"requested": "SIGTERM"}
    assert first["child"] is second["child"] is None


def test_the_marker_says_why_and_where(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    clear_requeue(tmp_path)
    write_requeue(tmp_path, "SIGUSR1", 120)
    content = json.loads(requeue_marker(tmp_path).read_text())
    assert content.pop("time").startswith("20")
    assert content == {"signal": "SIGUSR1", "step": 120, "job": "4711", "starts_without_step": 0}
    clear_requeue(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    write_requeue(tmp_path, "SIGUSR1", 120)
    assert json.loads(requeue_marker(tmp_path).read_text())["job"] == "4700_3"


def test_a_run_that_is_requeued_without_a_step_gives_up(tmp_path: Path) -> None:
    write_requeue(tmp_path, "SIGUSR1", 7)
    for start in range(1, MOST_STARTS):
        take_requeue(tmp_path)
        assert not requeue_marker(tmp_path).exists()
        write_requeue(tmp_path, "SIGUSR1", 7 if start % 2 else None)
        assert json.loads(requeue_marker(tmp_path).read_text())["starts_without_step"] == start
    take_requeue(tmp_path)
    with pytest.raises(TrainingError, match=r"step 7: SIGUSR1 stopped 3 starts in a row .* submit it again"):
        write_requeue(tmp_path, "SIGUSR1", 7)
    assert list(tmp_path.iterdir()) == []
    write_requeue(tmp_path, "SIGUSR1", 7)  # submitted again
    take_requeue(tmp_path)
    write_requeue(tmp_path, "SIGUSR1", 8)  # the control: it had a step
    assert json.loads(requeue_marker(tmp_path).read_text())["starts_without_step"] == 0
    last_marker(tmp_path).unlink(missing_ok=True)
    os.mkfifo(last_marker(tmp_path))  # not waited for
    write_requeue(tmp_path, "SIGUSR1", 9)
    last_marker(tmp_path).unlink()
    last_marker(tmp_path).write_text("[]")  # no marker
    write_requeue(tmp_path, "SIGUSR1", None)


@pytest.mark.parametrize("text", ['{"step": 7, "starts_without_step": -100}', '{"step": -7}', '{"step": "7"}', "", "{",
                                  '{"step": 7, "starts_without_step": "2"}',
                                  '{"step": 7, "starts_without_step": true}'])
def test_a_marker_that_makes_no_sense_counts_as_none(tmp_path: Path, text: str) -> None:
    last_marker(tmp_path).write_text(text)
    write_requeue(tmp_path, "SIGUSR1", 7)
    assert json.loads(requeue_marker(tmp_path).read_text())["starts_without_step"] == 0


def _start_of_a_job(monkeypatch: Any, run_dir: Path, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if restart:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    else:
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    run = RunDirectory(config_of(run_dir, run_dir), first=True)
    try:
        run.claim()
    finally:
        run.release()


def test_a_run_that_is_killed_before_a_step_and_requeued_gives_up(tmp_path: Path, monkeypatch: Any) -> None:
    """SIGKILL leaves no marker: SLURM's own count of its starts is what there is."""
    start = partial(_start_of_a_job, monkeypatch, tmp_path)
    for _ in range(5):
        start("4711", 0)  # the control: by hand, in a shell of one job
    for restart in (1, 2):
        start("4711", restart)
    note_first_step(tmp_path)
    for restart in (3, 4, 5):  # the control: there was a step in the start before these
        start("4711", restart)
    with pytest.raises(TrainingError, match=r"SLURM job 4711 was killed 3 starts in a row before a step: .* submit it"):
        start("4711", 6)
    assert list(tmp_path.iterdir()) == []
    start("4711", 7)  # requeued by hand: counted anew
    for restart in range(3):
        start("4712", restart)  # submitted again
    with pytest.raises(TrainingError, match="4712"):
        start("4712", 3)
    starts_file(tmp_path).write_text("[]")
    start("4713", 40)  # by a run that was always well
    note_first_step(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "many")
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT='many' must be a whole number"):
        note_first_step(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name)
    clear_requeue(tmp_path)
    note_first_step(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing outside SLURM


def _end_alone(run_dir: Path, first: bool) -> int:
    child = os.fork()
    if child == 0:
        end_alone(run_dir, first, "SIGHUP")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_rank_that_ends_alone_leaves_the_marker_if_it_is_the_first_and_the_run_its_own(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert _end_alone(run_dir, False) == EXIT_REQUEUE
    assert not run_dir.exists()
    assert _end_alone(run_dir, True) == EXIT_REQUEUE
    assert json.loads(requeue_marker(run_dir).read_text())["signal"] == "SIGHUP"
    clear_requeue(run_dir)
    held = RunLock(run_dir)  # of another process than the child
    assert _end_alone(run_dir, True) == EXIT_REQUEUE
    assert not requeue_marker(run_dir).exists()
    held.release()
    (tmp_path / "file").touch()
    assert _end_alone(tmp_path / "file", True) == 1  # the marker cannot be written


def test_a_rank_answers_by_itself_in_time_only_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [100.0], []

    def selected(*files: Any) -> Any:
        looks.append(clock[0])
        return select.select(*files[:3], 0.01)

    def pass_time(seconds: float) -> None:
        """And let the thread look twice after that."""
        clock[0] += seconds
        before = len(looks)
        wait_for(lambda: len(looks) > before + 2)

    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(signals, "select", SimpleNamespace(select=selected))
    ended: list[str] = []
    noted = signals.Signals().install()
    try:
        noted.until_first_step(ended.append)
        noted.end_alone()
        assert ended == []  # nobody asked
        noted.until_first_step(ended.append)
        os.kill(os.getpid(), signal.SIGHUP)
        noted.until_first_step(None)  # a step is done
        pass_time(PATIENCE + 0.1)
        assert ended == []
        noted.until_first_step(ended.append)  # the control
        pass_time(0.0)
        assert ended == ["SIGHUP"]
        noted.until_first_step(ended.append, first=False)
        pass_time(4.0)
        assert ended == ["SIGHUP"]  # the first rank goes first
        noted.end_alone()
        assert ended == ["SIGHUP", "SIGHUP"]
        noted.until_first_step(ended.append, first=False)
        pass_time(1.0)
        assert ended == ["SIGHUP"] * 3  # in its time
    finally:
        noted.uninstall()
