"""The doctor over two machines, of which the second one is really ill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyena_dist.cli.build import main as build_shards
from tests.conftest import SAMPLE
from tests.e2e.test_pretrain import ENVIRONMENT, ROOT
from tests.nodes.machines import Machine, die_with_the_tests

pytestmark = pytest.mark.slow


def doctor(machines: list[Machine], *arguments: str, first: str = "", second: str = "") -> tuple[int, dict[str, Any]]:
    """One rank on each machine, started as by srun, after a shell has done what is to be done there before."""
    processes = []
    for rank, (machine, before) in enumerate(zip(machines, (first, second), strict=True)):
        step = ["SLURM_JOB_ID=7", "SLURM_STEP_ID=0", "SLURM_NTASKS=2", f"SLURM_PROCID={rank}", "SLURM_LOCALID=0",
                f"SLURM_NODEID={rank}", "SLURM_STEP_NODELIST=alder,birch", "SLURM_STEP_TASKS_PER_NODE=1(x2)",
                "SLURM_JOB_NODELIST=alder,birch"]
        words = [sys.executable, "launchers/doctor.py", "--json", "--timeout", "15", *arguments]
        processes.append(subprocess.Popen(machine.enter("env", *step, "bash", "-c", f'{before or ":"}; exec "$@"', "-",
                                                        *words), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                          preexec_fn=die_with_the_tests))
    said, _ = processes[0].communicate(timeout=200)
    processes[1].wait(100)
    report = json.loads(said)
    for finding in report["findings"]:
        print(finding)
    return processes[0].returncode, report


def of_run(shards: Path, run_dir: Path) -> list[str]:
    return ["--config", "configs/quickstart.yaml", f"data.shards={shards}", f"train.run_dir={run_dir}"]


def test_two_sound_machines(machines, shards, tmp_path):
    status, report = doctor(machines, *of_run(shards, tmp_path / "run"))
    assert (status, report["findings"]) == (0, [])
    assert [(row["what"], row["where"]) for row in report["bandwidth"]] == [
        ("copy", "alder"), ("all-reduce", "between 2 hosts"), ("all-to-all", "between 2 hosts"), ("copy", "birch")]


def test_four_faults_of_the_second_machine_at_once(machines, shards, tmp_path):
    other, runs = tmp_path / "other", tmp_path / "runs"
    runs.mkdir()
    assert build_shards([str(SAMPLE / "phix174.fa.gz"), "--val-fraction", "0.1", "--out", str(other)]) == 0
    machines[1].call("mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    machines[1].call("mount", "--bind", str(other), str(shards))
    machines[1].call("mount", "--bind", str(runs), str(runs))
    machines[1].call("mount", "-o", "remount,ro,bind", str(runs))
    status, report = doctor(machines, *of_run(shards, runs / "mine"), second="ulimit -n 256")
    assert status == 1
    whats = [finding["what"] for finding in report["findings"]]
    assert whats[0] == "shards differ"
    assert whats[1:] == ["/dev/shm: 1 MiB free, 1 rank wants 64 MiB", "may open 256 files, and needs 520",
                         f"{runs}: cannot be written, synced and renamed in (Read-only file system)"]
    assert all("birch" in finding["where"] for finding in report["findings"])
    assert not list(runs.iterdir())


def test_a_run_directory_that_each_machine_has_for_itself_and_an_interface_that_leads_nowhere(machines, shards,
                                                                                             tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    machines[1].call("mount", "-t", "tmpfs", "none", str(runs))
    status, report = doctor(machines, *of_run(shards, runs / "mine"), second="export GLOO_SOCKET_IFNAME=lo")
    assert status == 1
    whats = [finding["what"] for finding in report["findings"]]
    assert "GLOO_SOCKET_IFNAME=lo reaches no other host" in whats
    assert f"{runs}: what rank 0 has just written is not there" in whats


def test_a_machine_that_is_unplugged_did_not_come(machines):
    machines[1].unplug()
    status, report = doctor(machines)
    assert status == 1
    [finding] = report["findings"]
    assert (finding["what"], finding["where"]) == ("did not come: 1 of 2 ranks", "rank 1 (host birch)")
