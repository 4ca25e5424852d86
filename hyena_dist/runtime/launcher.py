"""What a launcher says of this process: its rank, its job, its time-outs. The only place that reads a launcher's
environment. Nothing here imports torch, so that a process can answer signals before it has.
"""

import itertools
import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil

from hyena_dist.config.errors import ConfigError

DEFAULT_MINUTES = 10
"""How long a collective may wait for a rank. Long enough for what ranks do unequally: the first compilation of kernels,
reading a checkpoint. Short enough not to hold a cluster for an evening."""

_LAUNCHERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
                        "torchrun", "torch.distributed.run", "torch.distributed.launch"})


def collective_timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """How long a collective may wait: DeepSpeed's own DEEPSPEED_TIMEOUT (minutes), else 10 minutes.

    Raises:
        ConfigError: DEEPSPEED_TIMEOUT is not a whole number of minutes.
    """
    minutes = env.get("DEEPSPEED_TIMEOUT", str(DEFAULT_MINUTES))
    if not (minutes.isascii() and minutes.isdigit() and int(minutes) > 0):
        raise ConfigError(f"DEEPSPEED_TIMEOUT={minutes!r} must be a whole number of minutes, at least 1")
    return timedelta(minutes=int(minutes))


def job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """The SLURM job that this process is part of, by the name that scontrol takes: a task of an array has its own."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def launcher_processes(pid: int | None = None) -> list[psutil.Process]:
    """The launchers above a process (None: this one), nearest first. When one of them ends, so should the run.

    Under deepspeed these are launch.py and the `deepspeed` command, under torchrun its agent. A shell is none of them:
    a run outlives the terminal that it was started from.
    """
    return list(itertools.takewhile(_is_launcher, psutil.Process(pid).parents()))


def leave(status: int) -> NoReturn:
    """End this process now, with what it has said written out.

    For every end but that of a whole run: interpreter shutdown and `destroy_process_group` wait for peers, which may
    hang in a collective that this rank will never enter.
    """
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with suppress(OSError, ValueError):
            flush()
    os._exit(status)


def rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """torch's own variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), whoever started this process.

    Raises:
        ConfigError: a variable that the launcher should have set is missing.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world = {"RANK": env["RANK"], "WORLD_SIZE": env["WORLD_SIZE"], "LOCAL_RANK": env.get("LOCAL_RANK", "0")}
        missing = [key for key in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing and env["WORLD_SIZE"] != "1":
            raise ConfigError(f"RANK and WORLD_SIZE are set but {', '.join(missing)} are not: start the ranks with "
                             f"deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE to run one process")
        return world | {key: env[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in env}
    if _is_srun(env):
        tasks = _tasks(env)
        world = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": env.get("SLURM_LOCALID", "0")}
        return world if tasks == "1" else world | _slurm_master(env)
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `node[007-010,12],gpu1` is `node007`."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError(f"no host in SLURM_JOB_NODELIST={nodelist!r}: set MASTER_ADDR")
    prefix, ranges, suffix = match.groups()
    return prefix if ranges is None else prefix + re.split(r"[-,]", ranges)[0] + suffix


def _is_srun(env: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but it is one process: only a step has a SLURM_STEP_ID.
    in_batch_script = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    return "SLURM_PROCID" in env and "SLURM_NTASKS" in env and not in_batch_script


def _tasks(env: Mapping[str, str]) -> str:
    """Of this step: an interactive shell of salloc is a step of one task inside a job of many."""
    return env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]


def step_id(env: Mapping[str, str] = os.environ) -> str:
    """The job step, which is what its ranks have in common; empty: not started by srun."""
    return f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}" if _is_srun(env) else ""


def alone_in_a_job(env: Mapping[str, str] = os.environ) -> str | None:
    """What to say where one process runs in a job that has more tasks; None: nothing."""
    if "RANK" in env or not _is_srun(env) or _tasks(env) != "1" or env["SLURM_NTASKS"] == "1":
        return None
    return (f"one process in a job of {env['SLURM_NTASKS']} tasks: this is a shell of the job; start with srun to use "
            "them all")


def _slurm_master(env: Mapping[str, str]) -> dict[str, str]:
    if "MASTER_ADDR" not in env and "SLURM_JOB_NODELIST" not in env:
        raise ConfigError("srun started this rank, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: "
                         "export MASTER_ADDR=<first host of the job>")
    address = env.get("MASTER_ADDR") or first_host(env["SLURM_JOB_NODELIST"])
    # Steps that share a host need different ports; every rank of a step must derive the same one.
    number = int(env.get("SLURM_JOB_ID", "0")) + 1009 * int(env.get("SLURM_STEP_ID", "0"))
    port = env.get("MASTER_PORT") or str(20000 + number % 20000)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:5]  # python -u -m deepspeed.launcher.launch
    except psutil.Error:  # it has ended, or is another user's
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)
