"""Signals at any moment from the first import to the end: a whole checkpoint of the last step, or the marker.

Seeded trials of signal, launcher, target and moment. The first import is when every rank has its handlers, which is
the first thing that the program does; before that Python itself is starting.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hyena_dist.checkpoint.directory import find_latest
from tests.e2e.test_pretrain import ENVIRONMENT, ROOT, command, losses
from tests.e2e.test_signals import as_srun, catches, processes_of
from tests.processes import kill, send

STEPS = 150
SHORT = [f"train.steps={STEPS}", "train.eval_every=60", "train.save_every=50", "data.num_workers=1"]
SIGNALS = ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1")
LAUNCHERS = ("fork", "deepspeed", "torchrun")
SECONDS = 90
"""Until every process has ended: a launcher's 30 between its signal and its SIGKILL, on a machine that is busy."""


@dataclass(frozen=True)
class Trial:
    name: str
    launcher: str
    to: str
    """launcher: its command alone; ranks: every rank alone; group: all of them, as a terminal or srun does."""
    seconds: float | None
    """After the first import."""
    step: int
    """Without `seconds`: when this step has its row."""


def trials(seed: int, count: int) -> list[Trial]:
    draw, found = random.Random(seed), []
    for _ in range(count):
        name, launcher = draw.choice(SIGNALS), draw.choice(LAUNCHERS)
        targets = ["group", "ranks"] if launcher == "fork" else ["ranks"] if name == "SIGUSR1" else [
            "group", "ranks", "launcher"]  # SIGUSR1 ends a launcher at once, so nobody sends it there
        early = draw.random() < 0.5
        found.append(Trial(name, launcher, draw.choice(targets), draw.uniform(0, 12) if early else None,
                           draw.randint(1, STEPS)))
    return found


def _ranks(run_dir: Path) -> list[int]:
    found = []
    for pid in processes_of(run_dir):
        try:
            process = psutil.Process(pid)
            launching = any("deepspeed" in word or "torchrun" in word or word == "-c" for word in process.cmdline()[:4])
            if not launching and {"RANK", "SLURM_PROCID"} & process.environ().keys():
                found.append(pid)
        except psutil.Error:
            continue
    return found


def _default_signals() -> None:
    """As from a terminal: under a shell's background SIGINT comes in ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _wait(condition, process: subprocess.Popen, what: str) -> bool:
    """False: the run has ended before."""
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return True


def interrupt(trial: Trial, shards: Path, run_dir: Path) -> str:
    """One run with its signal; returns what became of it."""
    start = (as_srun(shards, run_dir, *SHORT) if trial.launcher == "fork" else
             command(trial.launcher, shards, run_dir, *SHORT))
    process = subprocess.Popen(start, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=(run_dir.parent / f"{run_dir.name}.err").open("w"), preexec_fn=_default_signals)
    try:
        assert _wait(lambda: len(_ranks(run_dir)) == 2 and all(map(catches, _ranks(run_dir))), process, "no ranks")
        if trial.seconds is not None:
            time.sleep(trial.seconds)
        else:
            _wait(lambda: max(losses(run_dir), default=0) >= trial.step, process, "no steps")
        number = signal.Signals[trial.name]
        if trial.to == "group":
            os.killpg(process.pid, number)
        send(number, _ranks(run_dir) if trial.to == "ranks" else [process.pid] if trial.to == "launcher" else [])
        deadline = time.monotonic() + SECONDS
        while processes_of(run_dir):
            process.poll()
            assert time.monotonic() < deadline, f"still there after {SECONDS} s: {processes_of(run_dir)}"
            time.sleep(0.1)
    finally:
        kill(processes_of(run_dir))
        process.wait()
    return outcome(run_dir)


def outcome(run_dir: Path) -> str:
    """Checks what a run has left."""
    rows = losses(run_dir)
    newest = find_latest(run_dir / "checkpoints")
    if (run_dir / "summary.json").exists():
        assert newest is not None
        assert newest.path.name == f"step-{STEPS:08d}"
        return "finished"
    marker = json.loads((run_dir / "requeue.json").read_text())
    assert marker["step"] == max(rows, default=0)
    if not rows:
        assert newest is None
        return f"marker: {marker['signal']}"
    assert newest is not None
    assert newest.path.name == f"step-{max(rows):08d}"
    return f"saved at step {marker['step']}: {marker['signal']}"


@pytest.mark.parametrize("trial", [
    Trial("SIGINT", "torchrun", "group", None, 20),
    pytest.param(Trial("SIGUSR1", "fork", "ranks", 0.0, 0), marks=pytest.mark.slow),
    pytest.param(Trial("SIGHUP", "deepspeed", "group", 3.0, 0), marks=pytest.mark.slow),
], ids=lambda trial: f"{trial.launcher}-{trial.name}")
def test_a_signal_at_a_chosen_moment(shards, tmp_path, trial):
    became = interrupt(trial, shards, tmp_path / "run")
    print(f"{trial}: {became}")
    if trial.seconds == 0.0:
        assert became == f"marker: {trial.name}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_signals_at_moments_drawn_by_seed(shards, tmp_path):
    failed = []
    for number, trial in enumerate(trials(seed=11, count=30)):
        try:
            print(f"{number} {trial}: {interrupt(trial, shards, tmp_path / str(number))}", flush=True)
        except (AssertionError, OSError) as error:
            failed.append((number, trial, error))
            print(f"{number} {trial}: FAILED {error}", flush=True)
    assert not failed


def test_a_second_ctrl_c_ends_at_once(shards, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command("python", shards, run_dir, *SHORT), cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=_default_signals)
    assert _wait(lambda: catches(process.pid), process, "no handlers")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first asks for a save
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted twice" in said


def test_what_was_ignored_at_the_start_stays_ignored():
    """As under nohup: a run outlives its terminal."""
    code = ("import os, signal, sys, time\n"
            "import hyena_dist.runtime.requeue\nfrom hyena_dist.runtime.signals import PROCESS\nPROCESS.install()\n"
            "os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2); before = PROCESS.reason\n"
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); print(before, PROCESS.reason)\n"
            "PROCESS.uninstall(); print('torch' in sys.modules)")
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                             preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert started.stdout.split() == ["None", "SIGTERM", "False"]
