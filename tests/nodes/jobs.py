"""Runs over several machines, started as each launcher does it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from hyena_dist.checkpoint.directory import is_sound, step_of
from tests.e2e.test_pretrain import BIN, ENVIRONMENT, ROOT, SMALL, losses
from tests.nodes.machines import Machine, die_with_the_tests

ARGUMENTS = [*SMALL, "train.eval_every=0", "data.num_workers=0", "engine.offload=none"]


class Job:
    """The same number of ranks on each machine.

    Args:
        launcher: how they are started: deepspeed with a hostfile, torchrun (with its rendezvous), static (torchrun
            with an address), or srun.
        ranks: on each machine.
        missing: ranks that srun does not start.
    """

    def __init__(self, launcher: str, machines: Sequence[Machine], directory: Path, *arguments: str, ranks: int = 2,
                 missing: Sequence[int] = (), **environment: str) -> None:
        command = ["launchers/pretrain.py", "--config", "configs/quickstart.yaml", *ARGUMENTS, *arguments]
        variables = ENVIRONMENT | environment
        self.output = directory / "output.txt"
        self._before = self.output.stat().st_size if self.output.exists() else 0
        if launcher == "deepspeed":
            hostfile = directory / "hostfile"
            hostfile.write_text("".join(f"{machine.name} slots={ranks}\n" for machine in machines))
            variables |= {"PATH": f"{Path(__file__).parent}:{variables['PATH']}",
                          "MACHINES": json.dumps({machine.name: machine.enter() for machine in machines})}
            commands = [[f"{BIN}/deepspeed", "--hostfile", str(hostfile), "--launcher", "pdsh", "--no_ssh_check",
                         "--master_addr", machines[0].address, "--master_port", "29500", *command]]
        elif launcher == "srun":
            names = ",".join(machine.name for machine in machines)
            common = ["SLURM_JOB_ID=7", "SLURM_STEP_ID=0", f"SLURM_NTASKS={ranks * len(machines)}",
                      f"SLURM_JOB_NODELIST={names}", f"SLURM_STEP_NODELIST={names}",
                      f"SLURM_STEP_TASKS_PER_NODE={ranks}(x{len(machines)})"]
            commands = [machine.enter("env", *common, f"SLURM_PROCID={ranks * node + local}", f"SLURM_LOCALID={local}",
                                      f"SLURM_NODEID={node}", sys.executable, *command)
                        for node, machine in enumerate(machines) for local in range(ranks)
                        if ranks * node + local not in missing]
        else:
            where = {"torchrun": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "alder:29400", "--rdzv-id", "x"],
                     "static": ["--master-addr", "alder", "--master-port", "29500"]}[launcher]
            commands = [machine.enter(f"{BIN}/torchrun", "--nnodes", str(len(machines)), "--nproc-per-node", str(ranks),
                                      *where, *(["--node-rank", str(node)] if launcher == "static" else []), *command)
                        for node, machine in enumerate(machines)]
        with self.output.open("ab") as output:
            self.processes = [subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output,
                                               preexec_fn=die_with_the_tests) for command in commands]

    def wait(self, seconds: float = 500) -> list[int]:
        """Until all have ended; returns their statuses."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()[-4000:]) from None

    def wait_for_one(self, seconds: float = 500) -> None:
        """Until one of them has ended."""
        deadline = time.monotonic() + seconds
        while all(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, self.said()[-4000:]
            time.sleep(0.05)

    def wait_for_steps(self, run_dir: Path, count: int, seconds: float = 500) -> None:
        deadline = time.monotonic() + seconds
        while len(losses(run_dir) if (run_dir / "metrics.jsonl").exists() else ()) < count:
            assert time.monotonic() < deadline, self.said()[-4000:]
            assert all(process.poll() is None for process in self.processes), self.said()[-4000:]
            time.sleep(0.01)

    def said(self) -> str:
        """What this one said; several may share a directory."""
        return self.output.read_bytes()[self._before:].decode(errors="replace")

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def kill(self, machines: Iterable[Machine]) -> None:
        """What is left of it, whoever started it."""
        for process in self.processes:
            process.kill()
        for machine in machines:
            machine.kill_all()
        self.wait(30)


def ended_after(machines: Iterable[Machine], limit: float, *, ranks: bool = False) -> float:
    """How long it took until nothing runs on the machines any more.

    Args:
        ranks: look at ranks only. A torchrun that is cut off from its store asks it for minutes after its ranks ended.
    """
    began, machines = time.monotonic(), list(machines)
    while left := [(machine.name, words) for machine in machines for words in map(_words, machine.processes())
                   if words and not (ranks and any(word.endswith("torchrun") for word in words))]:
        assert time.monotonic() - began < limit, left
        time.sleep(0.1)
    return time.monotonic() - began


def _words(process: psutil.Process) -> list[str]:
    """Its command; of one that has ended nothing."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def check_same(run_dir: Path, expected: dict[int, float]) -> None:
    """The losses are those of another run."""
    found = losses(run_dir)
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - loss) for step, loss in expected.items())
    print(f"largest difference of a loss: {worst:.1e}")
    assert worst < 1e-5


def newest_of_sound(run_dir: Path) -> int:
    """The step of the newest checkpoint. None that is there is torn, though whoever wrote it was killed."""
    steps = {step: path for path in (run_dir / "checkpoints").iterdir() if (step := step_of(path)) is not None}
    for path in steps.values():
        assert is_sound(path), f"{path} is torn: {sorted(file.name for file in path.iterdir())}"
    return max(steps, default=0)
