"""Whole jobs under stand-ins for SLURM's commands that start real processes: signals at any moment, and after."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import latest
from tests.e2e.test_pretrain import ENVIRONMENT, ROOT, SMALL, losses
from tests.e2e.test_signals import catches
from tests.processes import kill, send

FAKES = ROOT / "tests" / "slurm_fakes"
SECONDS = 240
EVAL_EVERY, SAVE_EVERY = 20, 7


class Cluster:
    """SLURM's commands, and the jobs that were submitted by them; all of it is killed at the end."""

    def __init__(self, directory: Path, *, hold: bool) -> None:
        self.state = directory / "slurm"
        self.state.mkdir()
        outside = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("SLURM_", "MASTER_"))}
        self._environment = {**outside, "PATH": f"{FAKES}:{outside['PATH']}", "FAKE_SLURM": str(self.state),
                             "PYTHONPATH": str(ROOT), **({"FAKE_SLURM_HOLD": "1"} if hold else {})}

    def __call__(self, *words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str) -> str:
        return self("sbatch", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1",
                    *words).split()[-1]

    def job(self, number: str) -> dict[str, Any]:
        return json.loads((self.state / f"{number}.json").read_text())

    def tasks(self, number: str) -> list[int]:
        return [int(pid) for path in self.state.glob(f"{number}.step.*") for pid in path.read_text().split()]

    def wait(self, condition: Callable[[], object], number: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log(number)
            time.sleep(0.005)

    def log(self, number: str) -> str:
        path = self.state / f"{number}.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        kill(process for process in psutil.process_iter(["environ"])
             if (process.info["environ"] or {}).get("FAKE_SLURM") == str(self.state))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(*, hold: bool = True) -> Cluster:
        made.append(Cluster(tmp_path, hold=hold))
        return made[-1]

    yield make
    for each in made:
        each.close()


def arguments(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["--config", "configs/quickstart.yaml", f"data.shards={shards}", f"train.run_dir={run_dir}", *SMALL,
            "model.num_layers=1", "data.num_workers=0", f"train.eval_every={EVAL_EVERY}",
            f"train.save_every={SAVE_EVERY}", "train.steps=100000", *overrides]


def trial(seed: int, cluster: Cluster, shards: Path, directory: Path) -> None:
    """A job that is signalled once or twice at a moment of its kind; it ends requeued, with its last step saved."""
    draw = random.Random(seed)
    moment = ("start", "step", "save", "validation")[seed % 4]
    name = draw.choice(["TERM", "USR1", "USR2"])
    one, twice = draw.random() < 0.4, draw.random() < 0.4
    run_dir = directory / "run"
    number = cluster.submit("launchers/slurm/pretrain.sbatch", *arguments(shards, run_dir))
    reached = {
        "start": lambda: len(tasks := cluster.tasks(number)) == 2 and all(map(catches, tasks)),
        "step": lambda: len(losses(run_dir)) >= 3 if run_dir.exists() else False,
        "save": lambda: any((run_dir / "checkpoints").glob("step-0*.tmp-*")),
        "validation": lambda: EVAL_EVERY in losses(run_dir) if (run_dir / "metrics.jsonl").exists() else False,
    }[moment]
    cluster.wait(lambda: reached() or cluster.job(number)["exit"] is not None, number)
    time.sleep(draw.uniform(0, 3) if moment == "start" else draw.uniform(0, 0.1))
    tasks = cluster.tasks(number)
    assert len(tasks) == 2, cluster.log(number)
    signalled = [draw.choice(tasks)] if one else tasks
    for again in range(1 + twice):
        send(getattr(signal, f"SIG{name}"), signalled)
        time.sleep(0.3 * (1 - again))
    cluster.wait(lambda: cluster.job(number)["exit"] is not None, number)
    said = f"seed {seed}: {name} {'twice ' * twice}to {len(signalled)} of 2 ranks in {moment}"
    assert (cluster.state / "requeued").read_text() == f"{number}\n", said + cluster.log(number)
    assert cluster.job(number)["state"] == "PENDING"
    marker = json.loads((run_dir / "requeue.json").read_text())
    last = max(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() and losses(run_dir) else 0
    print(said, "->", marker)
    assert (marker["signal"], marker["step"], marker["job"]) == (f"SIG{name}", last, number), said
    saved = latest(run_dir / "checkpoints") if last else None
    assert (saved.name if saved else None) == (f"step-{last:08d}" if last else None), said
    if last:  # the next start counts from here
        assert json.loads((run_dir / "starts.json").read_text()) == {"job": number, "last_with_step": 0}, said


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed != 1 else [])
                                  for seed in range(30)])
def test_a_signal_at_any_moment_ends_requeued_with_the_last_step_saved(seed, cluster, shards, tmp_path):
    trial(seed, cluster(), shards, tmp_path)


@pytest.mark.slow
def test_an_array_is_requeued_task_by_task_until_each_is_done(cluster, shards, tmp_path):
    """Tasks are signalled by SLURM before their time is up, and go on where they were."""
    script = tmp_path / "array.sbatch"
    script.write_text((ROOT / "launchers/slurm/pretrain.sbatch").read_text().replace(
        '"$@"', f'"$@" train.run_dir={tmp_path}/run-$SLURM_ARRAY_TASK_ID'))
    slurm = cluster(hold=False)
    first = int(slurm.submit("--array=0-1", "--time=10:00", str(script), *arguments(
        shards, tmp_path / "none", "train.steps=60", "train.eval_every=0")))
    numbers = [str(first), str(first + 1)]
    for place, number in enumerate(numbers):
        slurm.wait(lambda place=place: len(losses(tmp_path / f"run-{place}")) > 2
                   if (tmp_path / f"run-{place}/metrics.jsonl").exists() else False, number)
        slurm("scancel", "--signal=USR1", f"{first}_{place}")
    for number in numbers:
        slurm.wait(lambda number=number: slurm.job(number)["state"] in ("COMPLETED", "FAILED"), number)
        assert slurm.job(number)["state"] == "COMPLETED", slurm.log(number)
    assert sorted((slurm.state / "requeued").read_text().split()) == [f"{first}_0", f"{first}_1"]


@pytest.mark.slow
def test_ranks_of_deepspeed_launched_by_slurm_find_each_other(cluster, shards, tmp_path, monkeypatch):
    """It gives its tasks neither RANK nor MASTER_ADDR."""
    monkeypatch.setitem(ENVIRONMENT, "LAUNCHER", "slurm")
    slurm = cluster()
    number = slurm.submit("--time=10:00", "launchers/slurm/deepspeed.sbatch",
                          *arguments(shards, tmp_path / "run", "train.steps=3", "train.eval_every=0"))
    slurm.wait(lambda: slurm.job(number)["exit"] is not None, number)
    assert slurm.job(number)["exit"] == 0, slurm.log(number)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_torchrun_under_srun_ends_before_the_job_and_is_requeued(cluster, shards, tmp_path):
    slurm = cluster()
    number = slurm.submit("--time=3:00", "launchers/slurm/torchrun.sbatch", *arguments(shards, tmp_path / "run"))
    slurm.wait(lambda: slurm.job(number)["exit"] is not None, number)
    assert (slurm.state / "requeued").exists(), slurm.log(number)
    assert json.loads((tmp_path / "run" / "requeue.json").read_text())["signal"] == "train.max_hours"


@pytest.mark.slow
def test_a_shell_of_salloc_is_one_process_and_two_steps_of_a_job_do_not_meet(cluster):
    """The variables of the stand-ins are those that ranks are made of."""
    # In one write each, so that the lines of two tasks do not mix.
    code = ("import os, sys; from hyena_dist.runtime.launcher import rank_environment as r; "
            "sys.stdout.write(str(r(os.environ)) + chr(10))")
    slurm = cluster()
    alone = slurm("salloc", "--nodes=1", "--ntasks-per-node=2", "python", "-c", code)
    assert "'WORLD_SIZE': '1'" in alone
    steps = slurm("salloc", "--nodes=2", "--ntasks-per-node=1", "bash", "-c",
                  f'srun python -c "{code}"; srun python -c "{code}"').splitlines()
    assert len(steps) == 4
    assert all("'WORLD_SIZE': '2'" in line and "'MASTER_ADDR': '127.0.0.1'" in line for line in steps)
    assert {line.count("'RANK': '1'") for line in steps} == {0, 1}
    assert len({line.partition("MASTER_PORT")[2] for line in steps}) == 2
