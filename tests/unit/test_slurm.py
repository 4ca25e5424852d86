"""The batch scripts, run by bash with stand-ins for SLURM's commands, and for what they start."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launchers" / "slurm"


@pytest.fixture
def slurm(tmp_path):
    """Run the script; `srun` writes its arguments, maybe the marker, and ends with a status; `scontrol` what it did."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")

    def command(name: str, text: str) -> None:
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)

    command("scontrol", f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/scontrol; fi')
    command("python", f'''if [ "$1" = launchers/pretrain.py ]; then
        [ -f {tmp_path}/mistake ] && echo "error: a mistake" >&2 && exit 2
        echo "$WORLD_SIZE ${{@: -1}}" > {tmp_path}/dry
        printf "data:\\n  shards: x\\ntrain:\\n  run_dir: {tmp_path}/my run\\n  seed: 0\\n"
        else exec {sys.executable} "$@"; fi''')
    for name in ("deepspeed", "squeue"):
        command(name, f'echo "$@" > {tmp_path}/{name}; [ "$1" != --hostfile ] || cp "$2" {tmp_path}/hostfile')
    (tmp_path / "my run").mkdir()

    def run(srun: str, script: str = "pretrain", **more: str) -> subprocess.CompletedProcess:
        command("srun", f'echo "$MASTER_ADDR ${{MASTER_PORT:-derived}} $@" > {tmp_path}/srun\n'
                        f'marker="{tmp_path}/my run/requeue.json"\n{srun}')
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "SLURM_"))}
        env = {**outside, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
               "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
               "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6", **more}
        return subprocess.run(["bash", SCRIPTS / f"{script}.sbatch", "--config", "a b.yaml", "train.steps=3"], env=env,
                              capture_output=True, text=True, check=False, timeout=60)

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
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")

    def start(python: str) -> subprocess.Popen:
        for name, text in (("scontrol", f'echo "$@" >> {tmp_path}/scontrol'),
                           ("python", f'echo "$@" > {tmp_path}/python\n{python}')):
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (commands / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                       "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "4703"}
        return subprocess.Popen(["bash", SCRIPTS / "sweep.sbatch", "--config", "a b.yaml"], env=environment)

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


def test_torchrun_is_started_once_a_node_and_ends_before_the_job(slurm, tmp_path):
    result = slurm('touch "$marker"; exit 1', script="torchrun", SLURM_JOB_END_TIME=str(int(time.time()) + 7200))
    assert result.returncode == 1, result.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"  # torchrun's status is 1 whatever its ranks' was
    said = (tmp_path / "srun").read_text()
    assert said.startswith("node7 derived --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=24 "), said
    assert 'torchrun --node-rank "$SLURM_NODEID" "$@"' in said  # each node has its own number
    assert "--nnodes 2 --nproc-per-node 4 --master-addr node7 --master-port 24711 --signals-to-handle" in said
    hours = re.search(r"launchers/pretrain.py train.max_hours=([0-9.]+) --config a b.yaml train.steps=3$", said, re.M)
    assert hours, said
    assert 1.9 < float(hours[1]) <= 2.0


def test_a_job_without_an_end_has_no_limit(slurm, tmp_path):
    assert slurm("exit 0", script="torchrun").returncode == 0  # this squeue says nothing
    assert "max_hours" not in (tmp_path / "srun").read_text()
    assert "--job 4711" in (tmp_path / "squeue").read_text()


@pytest.mark.parametrize("launcher", ["pdsh", "slurm"])
def test_deepspeed_gets_a_hostfile_and_the_first_host(slurm, tmp_path, launcher):
    result = slurm("", script="deepspeed", LAUNCHER=launcher, SLURM_JOB_END_TIME=str(int(time.time()) + 7200))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hostfile").read_text() == "node7 slots=4\nnode8 slots=4\n"
    said = (tmp_path / "deepspeed").read_text()
    assert " --master_addr node7 --master_port 24711 " in said
    assert ("--launcher slurm --force_multi --no_ssh_check --launcher_args --ntasks-per-node=4" in said) == (
        launcher == "slurm")
    assert "launchers/pretrain.py train.max_hours=" in said


@pytest.mark.parametrize("script", ["pretrain", "torchrun", "deepspeed"])
def test_fewer_tasks_than_gpus_are_refused(slurm, tmp_path, script):
    result = slurm("", script=script, SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 2
    assert result.stderr == "error: --ntasks-per-node=4, but 8 GPUs on a node: give sbatch as many of both\n"
    assert not (tmp_path / "srun").exists()
    assert not (tmp_path / "deepspeed").exists()


def scripts() -> list[Path]:
    """Every shell script of the project, by its first line or its name."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = [ROOT / name for name in files if (ROOT / name).is_file()]
    return [path for path in found if path.suffix in (".sh", ".sbatch")
            or re.match(rb"#!.*\b(ba|da|z|k)?sh\b", path.read_bytes()[:80])]


def shellcheck(*paths: Path) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).parent / "shellcheck", "--external-sources", *paths], cwd=ROOT,
                          capture_output=True, text=True, check=False)


def test_every_script_passes_shellcheck(tmp_path):
    found = scripts()
    assert {path.name for path in found} >= {"run", "fetch_wheels.sh", "common.sh", "pretrain.sbatch"}
    assert shellcheck(*found).stdout == ""
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\ncd $1; rm -r $2\n")  # the control
    assert "SC2086" in shellcheck(tmp_path / "wrong.sh").stdout


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
