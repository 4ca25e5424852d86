"""Ranks of other machines that do not come, or do not reach each other, are named from the start."""

import time

import pytest

from tests.nodes.jobs import Job
from tests.nodes.machines import cabled_machines, two_machines

pytestmark = pytest.mark.slow


def test_a_rank_that_was_not_started_is_named_with_its_machine(shards, tmp_path):
    with two_machines(tmp_path) as machines:
        job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={tmp_path}/run", "train.steps=3",
                  "train.global_batch_size=8", missing=(3,), DEEPSPEED_TIMEOUT="1")
        assert job.wait() == [1, 1, 1], job.said()[-4000:]
    assert "waiting for rank 3 (host birch) since 30 s" in job.said()
    assert any("waited" in error and "for rank 3 (host birch), of 4 ranks" in error for error in job.errors())


def test_two_machines_that_never_reached_each_other_are_named(shards, tmp_path):
    """Both reach the first rank."""
    with cabled_machines(tmp_path, 3) as (machines, cable):
        cable.set(cut=[(1, 2)])
        job = Job("srun", machines, tmp_path, f"data.shards={shards}", f"train.run_dir={tmp_path}/run", "train.steps=3",
                  "train.global_batch_size=6", ranks=1, DEEPSPEED_TIMEOUT="1")
        job.wait_for_one()
        began = time.monotonic()
        statuses = job.wait()
        took = time.monotonic() - began
        print(f"all ended {took:.1f} s after the first, with {statuses}: {job.errors()}")
    assert all(statuses)
    assert took < 30, "also the one of the two that waits for the other's call, of which chance decides"
    assert any("rank 1 (host birch)" in error and "rank 2 (host cedar)" in error for error in job.errors())
