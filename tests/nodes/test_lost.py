"""A machine or a cable that is lost ends a run in time, with a name and no torn checkpoint, and the same command goes
on."""

import random
import time
from pathlib import Path

import pytest

from tests.e2e.test_pretrain import losses
from tests.nodes.jobs import Job, check_same, ended_after, newest_of_sound
from tests.nodes.machines import Machine

pytestmark = pytest.mark.timeout(1500)  # several starts of four ranks each, which a busy machine takes minutes for
STEPS = 40


def lose(job: Job, machines: list[Machine], run_dir: Path, fault: str, draw: random.Random) -> int:
    """Lose the second machine at some moment between two steps or in a save. Returns the step to go on from."""
    before = max(losses(run_dir), default=0) if run_dir.exists() else 0
    job.wait_for_steps(run_dir, before + draw.randint(3, 15))
    time.sleep(draw.uniform(0, 0.1))
    if fault == "killed":
        machines[1].kill_all()
        limit, what = 15.0, "has ended"
    else:
        machines[1].unplug()
        limit, what = 60.0, "cannot be reached any more: host birch is down"
    taken = ended_after(machines[:1], limit)
    if fault == "unplugged":
        taken += ended_after(machines[1:], limit - taken, ranks=True)
    said = (run_dir / "logs" / "rank-00000.log").read_text()
    assert "(host birch" in said, said[-4000:]
    assert what in said or "have ended" in said, said[-4000:]
    if fault == "unplugged":  # each side names the other
        other = (run_dir / "logs" / f"rank-{len(list((run_dir / 'logs').glob('rank-*'))) - 1:05d}.log").read_text()
        assert "host alder is down" in other, other[-4000:]
    job.kill(machines)
    step = newest_of_sound(run_dir)
    print(f"{fault} at step {max(losses(run_dir))}: all ended after {taken:.1f} s, and step {step} is saved")
    return step


def go_on(job: Job, run_dir: Path, step: int, expected: dict[int, float]) -> None:
    assert max(job.wait()) == 0, job.said()[-4000:]
    assert f"step-{step:08d}" in job.said() if step else "a fresh start" in job.said(), job.said()[-4000:]
    check_same(run_dir, expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun", "static", "deepspeed"])
@pytest.mark.parametrize("fault", ["killed", "unplugged"])
def test_a_machine_is_lost_and_the_same_command_goes_on(machines, alone, shards, tmp_path, launcher, fault):
    draw = random.Random(f"{launcher} {fault}")
    run_dir = tmp_path / "run"
    arguments = [f"data.shards={shards}", f"train.run_dir={run_dir}", "train.save_every=2", f"train.steps={STEPS}",
                 "parallel.context=2", f"engine.name={draw.choice(['deepspeed', 'fsdp'])}"]
    print(arguments[-1])
    step = lose(Job(launcher, machines, tmp_path, *arguments), machines, run_dir, fault, draw)
    if fault == "unplugged":
        machines[1].call("ip", "link", "set", "eth0", "up")
    go_on(Job(launcher, machines, tmp_path, *arguments), run_dir, step, alone)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_no_checkpoint_is_torn_whenever_a_machine_is_killed(machines, alone, shards, tmp_path, seed):
    """A rank on each machine, of one context group, in a run that saves after every step."""
    run_dir = tmp_path / "run"
    arguments = [f"data.shards={shards}", f"train.run_dir={run_dir}", "train.save_every=1", f"train.steps={STEPS}",
                 "parallel.context=2", "train.keep_last=20"]
    draw = random.Random(seed)
    for _ in range(1 if seed == 0 else 2):
        lose(Job("srun", machines, tmp_path, *arguments, ranks=1), machines, run_dir, "killed", draw)
    if seed:
        go_on(Job("srun", machines, tmp_path, *arguments, ranks=1), run_dir, newest_of_sound(run_dir), alone)
