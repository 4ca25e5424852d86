"""Two machines of two ranks train as one does, under every launcher; a machine or a cable that is lost ends the run in
time, with a name, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.checkpoints import latest
from tests.e2e.test_pretrain import BIN, ENVIRONMENT, ROOT, losses, run
from tests.nodes.machines import Cable, Machine, die_with_the_tests, two_machines

pytestmark = pytest.mark.slow

SMALL = ["model.hidden_size=16", "model.max_seq_len=256", "data.seq_len=256", "train.micro_batch_size=2",
         "train.global_batch_size=4", "optim.warmup_steps=2", "train.eval_every=0", "data.num_workers=0",
         "engine.offload=none"]
STEPS = 8


class Job:
    """Two ranks on each of two machines.

    Args:
        launcher: how they are started: deepspeed with a hostfile, torchrun (with its rendezvous), static (torchrun
            with an address), or srun.
    """

    def __init__(self, launcher: str, machines: Sequence[Machine], directory: Path, *arguments: str) -> None:
        command = ["launchers/pretrain.py", "--config", "configs/quickstart.yaml", *SMALL, *arguments]
        environment = dict(ENVIRONMENT)
        self.output = directory / "output.txt"
        if launcher == "deepspeed":
            hostfile = directory / "hostfile"
            hostfile.write_text("".join(f"{machine.name} slots=2\n" for machine in machines))
            environment |= {"PATH": f"{Path(__file__).parent}:{environment['PATH']}",
                            "MACHINES": json.dumps({machine.name: machine.enter() for machine in machines})}
            commands = [[f"{BIN}/deepspeed", "--hostfile", str(hostfile), "--launcher", "pdsh", "--no_ssh_check",
                         "--master_addr", machines[0].address, "--master_port", "29500", *command]]
        elif launcher == "srun":
            common = ["SLURM_JOB_ID=7", "SLURM_STEP_ID=0", "SLURM_NTASKS=4", "SLURM_JOB_NODELIST=alder,birch"]
            commands = [machine.enter("env", *common, f"SLURM_PROCID={2 * node + local}", f"SLURM_LOCALID={local}",
                                      sys.executable, *command)
                        for node, machine in enumerate(machines) for local in range(2)]
        else:
            where = {"torchrun": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "alder:29400", "--rdzv-id", "x"],
                     "static": ["--master-addr", "alder", "--master-port", "29500"]}[launcher]
            commands = [machine.enter(f"{BIN}/torchrun", "--nnodes", "2", "--nproc-per-node", "2", *where,
                                      *(["--node-rank", str(node)] if launcher == "static" else []), *command)
                        for node, machine in enumerate(machines)]
        with self.output.open("ab") as output:
            self.processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output,
                                               preexec_fn=die_with_the_tests) for command in commands]

    def wait(self, seconds: float = 300) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()[-4000:]) from None

    def wait_for_steps(self, run_dir: Path, count: int, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while len(losses(run_dir) if (run_dir / "metrics.jsonl").exists() else ()) < count:
            assert time.monotonic() < deadline, self.said()[-4000:]
            assert all(process.poll() is None for process in self.processes), self.said()[-4000:]
            time.sleep(0.05)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> dict[int, float]:
    """The losses of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = run([sys.executable, "launchers/pretrain.py", "--config", "configs/quickstart.yaml", *SMALL,
                  f"data.shards={shards}", f"train.run_dir={run_dir}", f"train.steps={STEPS}"])
    assert result.returncode == 0, result.stderr
    return losses(run_dir)


@pytest.fixture
def machines(tmp_path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path) as (first, second, _):
        yield first, second


def check_same(run_dir: Path, expected: dict[int, float]) -> None:
    found = losses(run_dir)
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - loss) for step, loss in expected.items())
    print(f"largest difference of a loss: {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize(("launcher", "engine", "context"), [
    ("deepspeed", ["engine.name=deepspeed", "engine.zero_stage=2"], 4),
    ("torchrun", ["engine.name=fsdp"], 2),
    ("static", ["engine.name=deepspeed", "engine.zero_stage=3"], 2),
    ("srun", ["engine.name=fsdp"], 4),
])
def test_two_machines_train_as_one(machines, alone, shards, tmp_path, launcher, engine, context):
    """With 4 context ranks a sequence is split over the cable, with 2 inside each machine."""
    run_dir = tmp_path / "run"
    job = Job(launcher, machines, tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}",
              f"train.steps={STEPS}", f"parallel.context={context}", *engine)
    assert max(job.wait()) == 0, job.said()[-4000:]
    check_same(run_dir, alone)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
@pytest.mark.parametrize("fault", ["killed", "unplugged"])
def test_a_machine_is_lost_and_the_same_command_goes_on(machines, shards, tmp_path, launcher, fault):
    run_dir = tmp_path / "run"
    arguments = [f"data.shards={shards}", f"train.run_dir={run_dir}", "train.save_every=5", "parallel.context=2"]
    job = Job(launcher, machines, tmp_path, *arguments, "train.steps=100000")
    job.wait_for_steps(run_dir, 12)
    if fault == "killed":
        machines[1].kill_all()
    else:
        machines[1].unplug()
    lost, limit = time.monotonic(), 15 if fault == "killed" else 60
    while machines[0].processes() and time.monotonic() - lost < limit + 10:
        time.sleep(0.1)
    ended = time.monotonic() - lost
    print(f"{fault}: ended after {ended:.1f} s")
    left = [process.cmdline() for process in machines[0].processes()]
    assert ended < limit, (left, job.said()[-4000:])
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert "(host birch" in log
    assert ("cannot be reached any more: host birch is down" if fault == "unplugged" else "ended") in log
    for process in (*job.processes, *machines[1].processes()):
        process.send_signal(signal.SIGKILL)
    newest = latest(run_dir / "checkpoints")
    assert newest is not None
    saved = int(newest.name[5:])
    if fault == "unplugged":
        machines[1].call("ip", "link", "set", "eth0", "up")
    again = Job(launcher, machines, tmp_path, *arguments, f"train.steps={saved + 3}")
    assert max(again.wait()) == 0, again.said()[-4000:]
    assert f"resumed from {newest}" in again.said() or f"step {saved}" in again.said()
    assert max(losses(run_dir)) == saved + 3


@pytest.mark.parametrize("fault", [{"delay": 0.2}, {"loss": 0.05}], ids=["delayed", "losing"])
def test_a_bad_cable_changes_nothing(alone, shards, tmp_path, fault):
    """Packets 0.2 s late each way, or every twentieth lost, from the third step on."""
    run_dir = tmp_path / "run"
    with two_machines(tmp_path, cable=True) as (first, second, cable):
        assert isinstance(cable, Cable)
        job = Job("srun", (first, second), tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}",
                  f"train.steps={STEPS}", "parallel.context=2")
        job.wait_for_steps(run_dir, 1)
        cable.set(**fault)
        began = time.monotonic()
        assert max(job.wait(600)) == 0, job.said()[-4000:]
        print(f"{fault}: ended after {time.monotonic() - began:.0f} s")
    check_same(run_dir, alone)


def test_a_run_directory_of_one_machine_alone_is_refused(machines, shards, tmp_path):
    run_dir = tmp_path / "local" / "run"
    run_dir.parent.mkdir()
    machines[1].call("mount", "-t", "tmpfs", "none", str(run_dir.parent))
    job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}", "train.steps=2")
    assert job.wait() == [2, 2, 2, 2], job.said()[-4000:]
    errors = [line for line in job.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.said()[-4000:]
    assert f"rank 2 (host birch) does not see train.run_dir={run_dir} of rank 0 (host alder)" in errors[0]
    assert machines[1].call("ls", str(run_dir.parent)) == ""
    assert os.listdir(run_dir) == []
