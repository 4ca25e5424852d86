"""Ranks from the environments of the launchers."""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.launcher.multinode_runner import SlurmRunner

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime import launch
from hyena_dist.runtime.launch import (
    Place,
    _flight_recorder,
    _select_device,
    gather_places,
    lone_devices,
    shared_device,
)
from hyena_dist.runtime.launcher import (
    alone_in_a_job,
    collective_timeout,
    dry_run_ranks,
    expected_hosts,
    first_host,
    job_id,
    rank_environment,
    step_id,
    take_off_quotes,
)
from hyena_dist.runtime.nodelist import expand, tasks_by_host

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


def test_steps_of_a_job_do_not_meet_each_other() -> None:
    second = rank_environment({**SRUN, "SLURM_STEP_ID": "1"})
    assert second["MASTER_PORT"] != rank_environment(SRUN)["MASTER_PORT"]
    assert step_id({**SRUN, "SLURM_STEP_ID": "1"}) != step_id(SRUN) != ""  # though MASTER_PORT were set for both
    assert step_id(TORCHRUN) == ""
    joined = {**SRUN, **rank_environment(SRUN)}  # what a rank's environment is when it looks for the others
    assert step_id(joined) == step_id(SRUN)


def test_an_interactive_shell_of_a_job_is_one_process_and_is_told_so() -> None:
    """As salloc gives it: a step of one task inside a job of two, which would wait for the other for ever."""
    shell = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1",
             "SLURM_STEP_ID": "4294967290"}
    assert rank_environment(shell) == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert "one process in a job of 2 tasks" in str(alone_in_a_job(shell))
    started = {**shell, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # the control: by srun from there
    assert rank_environment(started)["WORLD_SIZE"] == "2"
    assert alone_in_a_job(started) is alone_in_a_job({**shell, **TORCHRUN}) is alone_in_a_job({}) is None
    assert alone_in_a_job({**shell, "SLURM_NTASKS": "1"}) is None


def test_a_half_set_environment_is_an_error() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        rank_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("wrong", ["abc", "", " ", "-1", "1.5", "1e3", "\u0663", "9" * 5000])
@pytest.mark.parametrize(("base", "name"), [
    *((TORCHRUN, name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")),
    *((SRUN, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")),
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS"),
])
def test_a_number_of_a_launcher_that_is_none_is_named(base: dict[str, str], name: str, wrong: str) -> None:
    rank_environment(base)  # the control
    with pytest.raises(ConfigError, match=f"the environment variable {name}=.* must be a whole number") as caught:
        rank_environment({**base, name: wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("environment", "message"), [
    ({**TORCHRUN, "RANK": "9", "WORLD_SIZE": "8"}, "RANK='9' must be .* from 0 to 7, because WORLD_SIZE is 8"),
    ({**TORCHRUN, "RANK": "4"}, "RANK='4' must be .* from 0 to 3"),
    ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID='4' must be .* from 0 to 3, because SLURM_NTASKS is 4"),
    ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be .* of at least 1"),
    ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http' must be .* from 1 to 65535"),
    ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT='65536' must be"),
    ({**SRUN, "MASTER_PORT": "0"}, "MASTER_PORT='0' must be"),
    ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR are not: start the ranks"),
    ({**SRUN, "SLURM_JOB_NODELIST": ""}, "export MASTER_ADDR"),
    ({"RANK": "3"}, "RANK=3 is set but WORLD_SIZE is not: start the ranks .* or unset RANK"),
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set but RANK is not: start the ranks"),
])
def test_what_a_launcher_set_fits_together(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_environment(environment)


def test_a_dry_run_is_told_its_ranks_by_a_launcher_or_by_world_size_alone() -> None:
    assert dry_run_ranks({}) is None
    assert dry_run_ranks({"WORLD_SIZE": "8"}) == 8
    assert dry_run_ranks(TORCHRUN) == dry_run_ranks(SRUN) == 4
    with pytest.raises(ConfigError, match="WORLD_SIZE='many' must be a whole number"):
        dry_run_ranks({"WORLD_SIZE": "many"})
    with pytest.raises(ConfigError, match="RANK=3 is set but WORLD_SIZE is not"):
        dry_run_ranks({"RANK": "3"})


@pytest.mark.parametrize(("nodelist", "host"), [
    ("node1", "node1"), ("node1,node2", "node1"), ("node[007-010,12]", "node007"), ("n[3,5]-ib,x", "n3-ib"),
    ("gpu-a[1-2],gpu-b7", "gpu-a1"), ("rack[1-2]-n[03-04]", "rack1-n03"), ("127.0.0.[1-2]", "127.0.0.1"),
])
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_step_on_some_hosts_of_its_job_meets_at_the_first_of_its_own() -> None:
    assert rank_environment(SRUN)["MASTER_ADDR"] == "gpu07"
    assert rank_environment(SRUN | {"SLURM_STEP_NODELIST": "gpu[09-10]"})["MASTER_ADDR"] == "gpu09"
    old = {key: value for key, value in SRUN.items() if key != "SLURM_JOB_NODELIST"}
    assert rank_environment(old | {"SLURM_NODELIST": "gpu3"})["MASTER_ADDR"] == "gpu3"


@pytest.mark.parametrize("nodelist", ["", " ", ",", "node[1-", "node1]", "node[]", "node[3-1]", "node[a-b]",
                                      "node[1-2,]", "node[1-999999999]", "a,,b", "a,", "a b"])
def test_a_node_list_that_is_none_says_what_to_set(nodelist: str) -> None:
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host(nodelist)


def test_all_hosts_of_a_list_and_the_tasks_of_each() -> None:
    assert expand("n[08-10,2],x") == ["n08", "n09", "n10", "n2", "x"]
    assert expand("r[1-2]n[3,5]-ib") == ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]
    assert tasks_by_host("2(x3),1") == [2, 2, 2, 1]
    for wrong in ("", "2(x", "x3", "2,,1", "-1", "2(x999999)"):
        with pytest.raises(ValueError, match="no counts of tasks"):
            tasks_by_host(wrong)


def test_where_each_rank_should_be_is_known_under_srun_unless_ranks_are_dealt_out_in_another_order() -> None:
    step = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    assert expected_hosts(step) == {0: "gpu07", 1: "gpu07", 2: "gpu08", 3: "gpu08"}
    assert expected_hosts(step | {"SLURM_STEP_NODELIST": "a,b"}) == {0: "a", 1: "a", 2: "b", 3: "b"}
    for other in ({"SLURM_LOCALID": "0"}, {"SLURM_NODEID": "0"}, {"SLURM_NODEID": "2"}, {"SLURM_NODEID": ""},
                  {"SLURM_STEP_TASKS_PER_NODE": "2"}, {"SLURM_STEP_TASKS_PER_NODE": "two"},
                  {"SLURM_JOB_NODELIST": "gpu[07-"}):
        assert expected_hosts(step | other) == {}
    assert expected_hosts(TORCHRUN) == {}


def test_the_time_out_is_ten_minutes_or_the_users() -> None:
    assert collective_timeout({}) == timedelta(minutes=10)
    assert collective_timeout({"DEEPSPEED_TIMEOUT": "45"}) == timedelta(minutes=45)
    for wrong in ("0", "-1", "soon", "", "9" * 17):
        with pytest.raises(ValueError, match="DEEPSPEED_TIMEOUT=.* must be a whole number from 1 to .*, in minutes"):
            collective_timeout({"DEEPSPEED_TIMEOUT": wrong})


def test_two_ranks_on_one_gpu_are_refused_unless_nccl_takes_them_for_two_hosts() -> None:
    one, two = Place("GPU-1", "node1", ""), Place("GPU-2", "node1", "")
    assert shared_device([one, two, Place("GPU-3", "node2", "")]) is None
    assert shared_device([one, one]) == ("ranks 0 and 1 share GPU GPU-1 of host node1, which NCCL refuses: start at "
                                         "most 1 rank there")
    assert "ranks 1 and 3 share GPU GPU-2 of host node1" in shared_device([one, two, Place("GPU-3", "node2", ""), two])
    assert "at most 2 ranks there" in shared_device([one, two, two])
    assert shared_device([one._replace(nccl_host="a"), one._replace(nccl_host="b")]) is None
    assert shared_device([one._replace(nccl_host="a"), one]) is None
    assert shared_device([one._replace(nccl_host="a")] * 2) is not None


@pytest.mark.parametrize(("count", "local_rank", "device"), [(1, 0, 0), (1, 3, 0), (8, 3, 3)])
def test_a_rank_that_is_shown_one_gpu_takes_it(count: int, local_rank: int, device: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --gpus-per-task=1: whatever its number on the machine is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    environment = {"RANK": "11", "LOCAL_RANK": str(local_rank)}
    assert _select_device(environment) == torch.device("cuda", device)
    assert environment["LOCAL_RANK"] == str(device)  # which DeepSpeed takes for the device
    if count > 1:
        with pytest.raises(ConfigError, match="rank 11 is number 8 on this machine, which has 8 devices"):
            _select_device({"RANK": "11", "LOCAL_RANK": "8"})


def test_what_one_visible_gpu_a_rank_costs_is_said_once() -> None:
    places = [Place("GPU-1", "node1", ""), Place("GPU-2", "node1", ""), Place("GPU-3", "node2", "")]
    assert "one of the 2 GPUs that ranks of node1 have, as with --gpus-per-task=1" in str(lone_devices(places))
    assert lone_devices(places[::2]) is None  # one GPU on each machine is all that there is


def test_quotes_that_deepspeed_means_for_a_shell_are_taken_off() -> None:
    """By its own code, for srun, which starts no shell."""
    args = argparse.Namespace(launcher_args="", include="", exclude="", num_nodes=-1, num_gpus=-1, user_script="x.py",
                              user_args=[], slurm_comment="")
    wanted = {"NCCL_SOCKET_IFNAME": "^lo,docker0", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth*",
              "NCCL_DEBUG_FILE": "/logs/of me"}
    given = {}
    for name, value in wanted.items():
        runner = SlurmRunner(args, "", {"node1": [0]})
        runner.add_export(name, value)
        [word] = [word for word in runner.get_cmd({}, {"node1": [0]}) if word.startswith("--export=")]
        given[name] = word.removeprefix(f"--export=ALL,{name}=")
    assert given["NCCL_SOCKET_IFNAME"] == '"^lo,docker0"'
    take_off_quotes(given)
    assert given == wanted
    others = {"GREETING": '"hello"', "NCCL_DEBUG": '"', "GLOO_SOCKET_IFNAME": '"a', "NCCL_ALGO": ""}  # the control
    left = dict(others)
    take_off_quotes(left)
    assert left == others


def test_every_rank_hears_of_every_place() -> None:
    store = dist.PrefixStore("test", dist.HashStore())
    places = [Place(f"GPU-{rank}", "node1", "") for rank in range(3)]
    with ThreadPoolExecutor(3) as ranks:
        found = list(ranks.map(lambda rank: gather_places(places[rank], store, rank, 3), range(3)))
    assert found == [places] * 3


def test_the_job_is_slurms() -> None:
    assert job_id(SRUN) == "123456"
    assert job_id({**SRUN, "SLURM_ARRAY_JOB_ID": "123400", "SLURM_ARRAY_TASK_ID": "7"}) == "123400_7"
    assert job_id(TORCHRUN) is None


@pytest.mark.parametrize(("shown", "said"), [("9", True), ("GPU-12", True), ("", False), ("-1", False), (None, False)])
def test_a_run_that_lands_on_the_cpu_because_of_a_variable_is_told_so(shown: str | None, said: bool,
                                                                      monkeypatch: pytest.MonkeyPatch,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(launch, "DRIVER", Path("/no/driver"))
    assert _select_device({"LOCAL_RANK": "0", "RANK": "0"}) == torch.device("cpu")
    assert "names no GPU" not in caplog.text, "the deepspeed command sets it on any machine"
    monkeypatch.setattr(launch, "DRIVER", Path("/"))
    assert _select_device({"LOCAL_RANK": "0", "RANK": "0"}) == torch.device("cpu")
    assert (f"CUDA_VISIBLE_DEVICES={shown} names no GPU" in caplog.text) is said


def test_nccl_says_in_the_run_directory_what_hung(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE",
             "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    _flight_recorder(torch.device("cpu"), tmp_path)
    assert not any(name in os.environ for name in names)
    _flight_recorder(torch.device("cuda"), tmp_path)
    assert [os.environ.get(name) for name in names] == ["2000", "1", f"{tmp_path}/nccl-rank-", None]
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere")  # the older name of the same
    _flight_recorder(torch.device("cuda"), tmp_path)
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ


def test_leaving_writes_out_what_was_said_and_waits_for_nobody() -> None:
    """A thread that never ends stands for a library's; an ordinary exit would wait for it."""
    script = ("import sys, threading, time\nfrom hyena_dist.runtime.launcher import leave\n"
              "threading.Thread(target=time.sleep, args=(60,)).start()\nprint('said', end='')\n{}(3)")
    left = subprocess.run([sys.executable, "-c", script.format("leave")], capture_output=True, text=True, check=False,
                          timeout=50)
    assert (left.returncode, left.stdout) == (3, "said")
