"""The batch script, run by bash with stand-ins for SLURM's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """Run the script; `srun` writes its arguments, maybe the marker, and ends with a status; `scontrol` what it did."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def command(name: str, text: str) -> None:
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)

    command("scontrol", f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/scontrol; fi')
    command("python", f'''if [ "$1" = launchers/pretrain.py ]; then
        [ -f {tmp_path}/mistake ] && echo "error: a mistake" >&2 && exit 2
        echo "$WORLD_SIZE ${{@: -1}}" > {tmp_path}/dry
        printf "data:\\n  shards: x\\ntrain:\\n  run_dir: {tmp_path}/my run\\n  seed: 0\\n"
        else exec {sys.executable} "$@"; fi''')
    (tmp_path / "my run").mkdir()

    def run(srun: str, **more: str) -> subprocess.CompletedProcess:
        command("srun", f'echo "$MASTER_ADDR ${{MASTER_PORT:-derived}} $@" > {tmp_path}/srun\n'
                        f'marker="{tmp_path}/my run/requeue.json"\n{srun}')
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "SLURM_"))}
        env = {**outside, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
               "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
               "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6", **more}
        return subprocess.run(["bash", SCRIPT, "--config", "a b.yaml", "train.steps=3"], env=env, capture_output=True,
                              text=True, check=False, timeout=60)

    return run


def test_a_run_that_saved_early_goes_back_into_the_queue(slurm, tmp_path):
    result = slurm('touch "$marker"; exit 85')
    assert result.returncode == 85, result.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert (tmp_path / "dry").read_text() == "8 --dry-run\n"
    assert (tmp_path / "srun").read_text() == ("node7 derived --cpus-per-task=6 --kill-on-bad-exit=1 python "
                                               "launchers/pretrain.py --config a b.yaml train.steps=3\n")


def test_a_task_of_an_array_goes_back_by_its_own_name(slurm, tmp_path):
    slurm('touch "$marker"; exit 85', SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="3")
    assert (tmp_path / "scontrol").read_text() == "requeue 4700_3\n"


@pytest.mark.parametrize("status", [0, 1, 85])
def test_without_the_marker_it_does_not(slurm, tmp_path, status):
    (tmp_path / "my run" / "requeue.json").touch()  # of a run before, which this one fails to clear
    result = slurm(f"exit {status}")
    assert result.returncode == status, result.stderr
    assert not (tmp_path / "scontrol").exists()
    assert (tmp_path / "my run" / "requeued.json").exists()  # from it the run counts its starts without a step


def test_a_mistake_in_the_configuration_starts_nothing(slurm, tmp_path):
    (tmp_path / "mistake").touch()
    result = slurm("exit 0")
    assert result.returncode == 2
    assert "error: a mistake" in result.stderr
    assert not (tmp_path / "srun").exists()


@pytest.fixture
def array(tmp_path):
    """Run the script of a task of a job array; `python` writes its arguments and does what it is told."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def start(python: str) -> subprocess.Popen:
        for name, text in (("scontrol", f'echo "$@" >> {tmp_path}/scontrol'),
                           ("python", f'echo "$@" > {tmp_path}/python\n{python}')):
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (commands / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                       "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "4703"}
        return subprocess.Popen(["bash", SCRIPT.with_name("sweep.sbatch"), "--config", "a b.yaml"], env=environment)

    return start


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (2, ""), (85, "requeue 4700_3\n")])
def test_a_task_runs_its_point_and_goes_back_where_that_was_stopped(array, tmp_path, status, requeued):
    assert array(f"exit {status}").wait(60) == status
    assert (tmp_path / "python").read_text() == "launchers/sweep.py run --config a b.yaml --index 3\n"
    assert ((tmp_path / "scontrol").read_text() if requeued else "") == requeued
    assert (tmp_path / "scontrol").exists() == bool(requeued)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_sweep_which_is_waited_for(array, tmp_path, number):
    task = array(f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 85' TERM\ntouch {tmp_path}/started\n"
                 "for _ in $(seq 300); do sleep 0.1; done")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    task.send_signal(number)
    assert task.wait(60) == 85
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 4700_3\n"


@pytest.mark.slow
def test_the_real_dry_run_says_where_the_run_is():
    """What the script does with the real command, for eight ranks."""
    environment = {**os.environ, "WORLD_SIZE": "8"}
    dry = subprocess.run([sys.executable, "launchers/pretrain.py", "--config", "configs/quickstart.yaml",
                          "train.run_dir=runs/my run", "parallel.tensor=8", "train.global_batch_size=8", "--dry-run"],
                         cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert dry.returncode == 0, dry.stderr
    said = subprocess.run([sys.executable, "-c",
                           'import sys, yaml; print(yaml.safe_load(sys.stdin)["train"]["run_dir"])'],
                          input=dry.stdout, capture_output=True, text=True, check=True)
    assert said.stdout == "runs/my run\n"
