"""Ranks that do not find each other end in time, with one line."""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hyena_dist.runtime import launch
from hyena_dist.runtime.launch import init_distributed
from tests.dist.harness import fork_server

TIMEOUT = timedelta(seconds=3)


def _join(directory: Path, name: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        init_distributed(TIMEOUT)
        said = "joined"
    except OSError as error:
        said = str(error)
    (directory / name).write_text(said)
    time.sleep(1)  # the others are still to hear of the first rank's store
    os._exit(0)


@pytest.fixture
def ranks(tmp_path):
    """Starts ranks, by name, and returns what each said. One that says nothing for a minute, as by torch's own time-out
    it would, fails the test."""
    def run(**environments: dict[str, str]) -> dict[str, str]:
        started = [fork_server().Process(target=_join, args=(tmp_path, name, environment))
                   for name, environment in environments.items()]
        for process in started:
            process.start()
        for process in started:
            process.join(60)
            process.kill()
        return {name: (tmp_path / name).read_text() for name in environments}

    return run


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def of_srun(rank: int, ranks: int, master_port: str, step: int = 0) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(step), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": master_port}


def test_ranks_that_are_all_there_join(ranks: Any) -> None:
    same = port()
    found = ranks(first=of_srun(0, 2, same), second=of_srun(1, 2, same))
    assert list(found.values()) == ["joined", "joined"]


def test_a_rank_that_never_comes_ends_the_others_in_time_and_is_named_with_its_host(ranks: Any) -> None:
    same = port()
    of_nodes = {"SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "0"}
    found = ranks(first=of_srun(0, 3, same) | of_nodes, second=of_srun(1, 3, same) | of_nodes)
    for said in found.values():
        assert " waited " in said, said
        assert "s for rank 2 (host node8), of 3 ranks" in said
        assert "\n" not in said
        assert said.endswith("DEEPSPEED_TIMEOUT sets the minutes to wait")


def test_a_first_rank_that_never_comes_is_named_with_its_host(ranks: Any) -> None:
    of_nodes = {"SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}
    found = ranks(second=of_srun(1, 2, port()) | of_nodes | {"SLURM_LOCALID": "0"})
    assert "could not meet rank 0 (host node7, 127.0.0.1:" in found["second"]


def test_a_second_step_with_the_port_of_the_first_is_refused_and_does_not_disturb_it(ranks: Any) -> None:
    same = port()
    found = ranks(first=of_srun(0, 2, same), second=of_srun(1, 2, same), other_second=of_srun(1, 2, same, step=1),
                  other_first={**of_srun(0, 2, same, step=1)})
    print(found)
    # Whose first rank gets the port is chance; the steps never mix.
    steps = [[found[name] for name in names] for names in (("first", "second"), ("other_first", "other_second"))]
    winner = next(step for step in steps if step[0] == "joined")
    loser = next(step for step in steps if step is not winner)
    assert winner == ["joined", "joined"]
    assert "another run has the port: choose another with deepspeed --master_port PORT, torchrun" in loser[0]
    assert "s for rank 0, of 2 ranks" in loser[1] or "could not meet rank 0 (127.0.0.1:" in loser[1]


def _share_a_gpu(directory: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    card = mock.Mock(uuid="GPU-1")
    with (mock.patch.object(launch, "_select_device", return_value=torch.device("cuda")),
          mock.patch.object(torch.cuda, "get_device_properties", return_value=card)):
        try:
            init_distributed(TIMEOUT)
        except Exception as error:  # noqa: BLE001 - whatever a rank would say
            (directory / environment["SLURM_PROCID"]).write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # at once: the first rank takes the store with it


def test_ranks_that_share_a_gpu_are_refused_by_every_rank(tmp_path) -> None:
    """The first one, which is done first, keeps the store until the others have read in it too."""
    same = port()
    started = [fork_server().Process(target=_share_a_gpu, args=(tmp_path, of_srun(rank, 6, same))) for rank in range(6)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    said = [(tmp_path / str(rank)).read_text() for rank in range(6)]
    assert set(said) == {said[0]}
    assert said[0].startswith("ConfigError: ranks 0 and 1 share GPU GPU-1 of host ")


def _fail_or_wait(environment: dict[str, str]) -> None:
    """Gloo reaches no other rank, as the second; waits for a call of the second, as the third."""
    def gloo(*_: Any, **__: Any) -> None:
        if environment["SLURM_PROCID"] == "2":
            time.sleep(60)
        raise RuntimeError("no route to host")

    os.environ.update(environment)
    launch.FOLLOW_SECONDS = 0.5
    with mock.patch.object(dist, "init_process_group", gloo), suppress(ConnectionError):
        if environment["SLURM_PROCID"] == "0":  # keeps the store
            kept = launch.meet(0, 3, TIMEOUT)
            time.sleep(60)
            del kept
        init_distributed(TIMEOUT)
    os._exit(3)


def test_a_rank_that_waits_for_one_that_has_given_up_ends_too() -> None:
    same = port()
    started = [fork_server().Process(target=_fail_or_wait, args=(of_srun(rank, 3, same),)) for rank in range(3)]
    for process in started:
        process.start()
    started[2].join(20)
    assert [process.exitcode for process in started] == [None, 3, 1]
    started[0].kill()
