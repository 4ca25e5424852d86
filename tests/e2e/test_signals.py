"""SIGTERM and SIGUSR1 under the real launchers: each ends with a whole checkpoint of the last step and a marker."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import latest
from tests.e2e.test_pretrain import ENVIRONMENT, ROOT, SMALL, command, losses, wait_for
from tests.processes import kill, send

SECONDS = 30
"""What a launcher gives a run between its signal and its SIGKILL."""


@contextmanager
def started(arguments: list[str], run_dir: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A run in a process group of its own that has trained some steps; killed at the end if anything is left."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT | environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(losses(run_dir)) > 3, process)
        yield process
    finally:
        kill(processes_of(run_dir))
        process.wait()


def processes_of(run_dir: Path) -> list[int]:
    """The ranks of a run, and their launchers, by their command line."""
    return [process.pid for process in psutil.process_iter(["cmdline"])
            if f"train.run_dir={run_dir}" in (process.info["cmdline"] or [])]


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught & 1 << (signal.SIGUSR1 - 1))


def ranks_of(run_dir: Path) -> list[int]:
    own = set(processes_of(run_dir))
    return [process.pid for process in psutil.process_iter(["environ"])
            if process.pid in own and "RANK" in (process.info["environ"] or {})]


def check_saved(run_dir: Path, name: str) -> None:
    """All processes end in time; the newest checkpoint and the marker are of the last step."""
    deadline = time.monotonic() + SECONDS
    while processes_of(run_dir):
        assert time.monotonic() < deadline, f"still there after {SECONDS} s: {processes_of(run_dir)}"
        time.sleep(0.1)
    last = max(losses(run_dir))
    marker = json.loads((run_dir / "requeue.json").read_text())
    assert (marker["signal"], marker["step"]) == (name, last)
    newest = latest(run_dir / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{last:08d}"
    assert not (run_dir / "summary.json").exists()


LONG = ["train.steps=100000", "train.eval_every=0", "train.save_every=0"]


@pytest.mark.slow
def test_sigterm_to_the_deepspeed_command_ends_its_orphans(shards, tmp_path):
    """It dies at once and tells its ranks nothing: they notice."""
    run_dir = tmp_path / "run"
    with started(command("deepspeed", shards, run_dir, *LONG), run_dir) as process:
        process.send_signal(signal.SIGTERM)
        check_saved(run_dir, "launcher gone")


@pytest.mark.slow
def test_sigusr1_to_the_ranks_under_deepspeed_is_status_85(shards, tmp_path):
    run_dir = tmp_path / "run"
    with started(command("deepspeed", shards, run_dir, *LONG), run_dir) as process:
        send(signal.SIGUSR1, ranks_of(run_dir))
        check_saved(run_dir, "SIGUSR1")
        assert process.wait(SECONDS) == 85


@pytest.mark.slow
def test_sigterm_to_torchrun(shards, tmp_path):
    run_dir = tmp_path / "run"
    with started(command("torchrun", shards, run_dir, *LONG), run_dir) as process:
        process.send_signal(signal.SIGTERM)
        check_saved(run_dir, "SIGTERM")


@pytest.mark.slow
def test_sigusr1_to_one_rank_under_torchrun(shards, tmp_path):
    run_dir = tmp_path / "run"
    with started(command("torchrun", shards, run_dir, *LONG), run_dir):
        os.kill(ranks_of(run_dir)[-1], signal.SIGUSR1)
        check_saved(run_dir, "SIGUSR1")


@pytest.mark.slow
def test_sigterm_to_the_process_group_of_deepspeed(shards, tmp_path):
    run_dir = tmp_path / "run"
    with started(command("deepspeed", shards, run_dir, *LONG), run_dir) as process:
        os.killpg(process.pid, signal.SIGTERM)
        check_saved(run_dir, "SIGTERM")


def as_srun(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A shell that starts two ranks in its process group with srun's variables, and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pretrain = [sys.executable, "launchers/pretrain.py", "--config", "configs/quickstart.yaml", f"data.shards={shards}",
                f"train.run_dir={run_dir}", *SMALL, *(overrides or LONG)]
    start = ("import subprocess, sys, os, signal\n"
             "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):\n"
             "    signal.signal(number, lambda *_: None)\n"
             f"variables = dict(SLURM_JOB_ID='7', SLURM_STEP_ID='0', SLURM_NTASKS='2', MASTER_ADDR='127.0.0.1', "
             f"MASTER_PORT='{port}')\n"
             "ranks = [subprocess.Popen(sys.argv[1:], env={**os.environ, **variables, 'SLURM_PROCID': str(rank), "
             "'SLURM_LOCALID': str(rank)}) for rank in range(2)]\n"
             "sys.exit(max(rank.wait() for rank in ranks))")
    return [sys.executable, "-c", start, *pretrain]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_the_process_group_as_srun_sends_it(shards, tmp_path, name):
    run_dir = tmp_path / "run"
    with started(as_srun(shards, run_dir), run_dir) as process:
        os.killpg(process.pid, getattr(signal, name))
        check_saved(run_dir, name)
        assert process.wait(SECONDS) == 85
        assert json.loads((run_dir / "requeue.json").read_text())["job"] == "7"


@pytest.mark.slow
def test_two_runs_in_one_directory(shards, tmp_path):
    run_dir = tmp_path / "run"
    with started(command("python", shards, run_dir, *LONG), run_dir):
        second = subprocess.run(command("python", shards, run_dir, *LONG), cwd=ROOT, env=ENVIRONMENT,
                                capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 2, second.stderr
        assert "is in use by another run" in second.stderr


@pytest.mark.slow
def test_readers_that_stand_still_end_the_run_with_the_remedy(shards, tmp_path):
    """In the minutes of DEEPSPEED_TIMEOUT, before its peers would give up in a collective."""
    run_dir = tmp_path / "run"
    arguments = command("python", shards, run_dir, *LONG, "data.num_workers=1")
    with started(arguments, run_dir, DEEPSPEED_TIMEOUT="1") as process:
        for reader in psutil.Process(process.pid).children():
            reader.suspend()
        stopped = time.monotonic()
        assert process.wait(120) == 1
        print(f"ended after {time.monotonic() - stopped:.0f} s of a minute")
    last = (run_dir / "logs" / "rank-00000.log").read_text().splitlines()[-1]
    assert "a batch did not come for 48 s: a reader process stands still, or " in last
    assert "resume with the same command" in last
