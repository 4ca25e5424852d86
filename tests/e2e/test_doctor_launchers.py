"""The doctor under each launcher, as a user starts it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.test_pretrain import ENVIRONMENT, ROOT

FAKES = ROOT / "tests" / "slurm_fakes"
DOCTOR = ["launchers/doctor.py", "--json", "--timeout", "60"]
COMMANDS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", *DOCTOR],
    "deepspeed": ["deepspeed", "--num_gpus", "2", *DOCTOR],
    "hostfile": ["python", *DOCTOR, "--hostfile", "hostfile"],
    "srun": ["salloc", "--nodes=1", "--ntasks-per-node=2", "srun", "python", *DOCTOR],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
def test_the_doctor_looks_at_every_rank_that_a_launcher_starts(launcher: str, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    outside = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("SLURM_", "MASTER_"))}
    environment = {**outside, "PATH": f"{FAKES}:{outside['PATH']}", "FAKE_SLURM": str(tmp_path),
                   "PYTHONPATH": str(ROOT)}
    command = [str(hostfile) if word == "hostfile" else word for word in COMMANDS[launcher]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{\n"):])  # deepspeed writes around it
    assert report["ok"], report["findings"]
    assert report["ranks"] == len(report["facts"]) == 2
    assert [row["what"] for row in report["bandwidth"]] == ["copy", "all-reduce", "all-to-all"]
