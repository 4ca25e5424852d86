"""Ranks from the environments of the launchers."""

import pytest

from hyena_dist.engine.launch import first_host, rank_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "gpu[07-10]"}


def test_deepspeed_and_torchrun_pass_through_also_inside_a_slurm_job() -> None:
    assert rank_environment({**TORCHRUN, "HOME": "/"}) == TORCHRUN
    assert rank_environment({**SRUN, **TORCHRUN, "SLURM_PROCID": "0"}) == TORCHRUN


def test_srun() -> None:
    assert rank_environment(SRUN) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07",
                                      "MASTER_PORT": "23456"}
    named = rank_environment({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "77"})
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("head", "77")
    without = {key: value for key, value in SRUN.items() if key != "SLURM_JOB_NODELIST"}
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        rank_environment(without)


def test_plain_python_is_one_process_also_in_a_batch_script() -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert rank_environment({}) == one
    assert rank_environment({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}) == one
    assert rank_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}) == one


def test_a_half_set_environment_is_an_error() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        rank_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("nodelist", "host"), [
    ("node1", "node1"), ("node1,node2", "node1"), ("node[007-010,12]", "node007"), ("n[3,5]-ib,x", "n3-ib"),
    ("gpu-a[1-2],gpu-b7", "gpu-a1"),
])
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
