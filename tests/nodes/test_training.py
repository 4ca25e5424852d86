"""Two machines train as one does, under every launcher, also over a bad cable."""

import os
import time

import pytest

from tests.nodes.jobs import Job, check_same
from tests.nodes.machines import cabled_machines

STEPS = 8


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cable_that_loses_packets_changes_nothing(alone, shards, tmp_path):
    """Every twentieth, from the first step on, and while the run is saved."""
    run_dir = tmp_path / "run"
    with cabled_machines(tmp_path) as (machines, cable):
        job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}",
                  f"train.steps={STEPS}", "parallel.context=2")
        cable.set(loss=0.05)
        assert max(job.wait()) == 0, job.said()[-4000:]
        lost = cable.set()
        print(f"{lost} packets were lost")
        assert lost > 20
    check_same(run_dir, alone)


@pytest.mark.slow
def test_a_cable_that_delays_packets_changes_nothing(alone, shards, tmp_path):
    """By 0.2 s each way, from the first step to the last. A step makes some twenty ways, which take it seconds; a save
    more than a hundred, so the cable is a good one again by then."""
    run_dir = tmp_path / "run"
    with cabled_machines(tmp_path) as (machines, cable):
        cable.set(delay=0.01)  # so that the first step is seen before the last one is done
        job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}",
                  f"train.steps={STEPS}", "parallel.context=2")
        job.wait_for_steps(run_dir, 1)
        cable.set(delay=0.2)
        began = time.monotonic()
        job.wait_for_steps(run_dir, STEPS)
        seconds = time.monotonic() - began
        cable.set()
        assert max(job.wait()) == 0, job.said()[-4000:]
        print(f"{STEPS - 1} steps took {seconds:.0f} s")
        assert seconds > 3 * (STEPS - 1)  # the control: all of them were delayed
    check_same(run_dir, alone)
    said = "".join(path.read_text() for path in (run_dir / "logs").iterdir())
    assert "cannot be reached" not in said
    assert "is slow" not in said  # no rank is


@pytest.mark.slow
def test_a_run_directory_of_one_machine_alone_is_refused(machines, shards, tmp_path):
    run_dir = tmp_path / "local" / "run"
    run_dir.parent.mkdir()
    machines[1].call("mount", "-t", "tmpfs", "none", str(run_dir.parent))
    job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={run_dir}",
              f"train.steps={STEPS}", "parallel.context=2")
    assert job.wait() == [2, 2, 2, 2], job.said()[-4000:]
    error, = job.errors()
    assert f"rank 2 (host birch) does not see train.run_dir={run_dir} of rank 0 (host alder)" in error
    assert machines[1].call("ls", str(run_dir.parent)) == ""
    assert os.listdir(run_dir) == ["starts.json"]  # this start of the job counts as one without a step
