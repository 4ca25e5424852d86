"""What a launcher says of this process: its rank, its job, its time-outs. The only place that reads a launcher's
environment. Nothing here imports torch, so that a process can answer signals before it has.
"""

import base64
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.nodelist import expand, tasks_by_host

DEFAULT_MINUTES = 10
"""How long a collective may wait for a rank. Long enough for what ranks do unequally: the first compilation of kernels,
reading a checkpoint. Short enough not to hold a cluster for an evening."""

_MOST_MINUTES = 365 * 24 * 60

_LAUNCHERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
                        "torchrun", "torch.distributed.run", "torch.distributed.launch",
                        "sweep", "sweep.py", "suite", "suite.py"})  # their runs save and end when they are killed


def collective_timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """How long a collective may wait: DeepSpeed's own DEEPSPEED_TIMEOUT (minutes), else 10 minutes.

    Raises:
        ConfigError: DEEPSPEED_TIMEOUT is not a whole number of minutes.
    """
    if "DEEPSPEED_TIMEOUT" not in env:
        return timedelta(minutes=DEFAULT_MINUTES)
    return timedelta(minutes=_whole(env, "DEEPSPEED_TIMEOUT", least=1, most=_MOST_MINUTES, because=", in minutes"))


def job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """The SLURM job that this process is part of, by the name that scontrol takes: a task of an array has its own."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has started this job again.

    Raises:
        ConfigError: SLURM_RESTART_COUNT is not a whole number.
    """
    return _whole(env, "SLURM_RESTART_COUNT", least=0) if "SLURM_RESTART_COUNT" in env else 0


_EXPORTED = ("CUDA_", "DEEPSPEED_", "GLOO_", "MASTER_", "NCCL_", "OMP_", "TORCH_", "UCX_", "WANDB_")
"""Begins the names of the variables that are read here, by torch, and by what ranks talk through."""


def take_off_quotes(env: MutableMapping[str, str] = os.environ) -> None:
    """Take off the double quotes that `deepspeed --launcher slurm` puts around a value with special characters, such as
    NCCL_SOCKET_IFNAME=^lo,docker0. It means them for a shell, but srun starts ranks without one, so that they would
    become part of the value. None of these variables has a value that begins and ends with quotes by itself."""
    for name, value in list(env.items()):
        if name.startswith(_EXPORTED) and len(value) >= 2 and value[0] == value[-1] == '"':
            env[name] = value[1:-1]


def first_address(env: Mapping[str, str] = os.environ) -> str | None:
    """By what name the other ranks reach the first one; None: nobody has said it."""
    return env.get("MASTER_ADDR") or None


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
        ConfigError: a variable that the launcher should have set is missing, or is not what it must be; names it.
    """
    if "RANK" in env and "WORLD_SIZE" in env:  # also torchrun or deepspeed inside a step of srun
        found = _of_launcher(env)
    elif _is_srun(env):
        found = _of_srun(env)
    else:
        for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
            if name in env:
                raise ConfigError(f"{name}={env[name]} is set but {other} is not: {_START}")
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return found


def dry_run_ranks(env: Mapping[str, str] = os.environ) -> int | None:
    """The number of ranks that a --dry-run is asked to check for: WORLD_SIZE, which here may stand alone, or what a
    launcher set; None: nothing says it.

    Raises:
        ConfigError: as `rank_environment`.
    """
    if "WORLD_SIZE" in env and "RANK" not in env and not _is_srun(env):
        return _whole(env, "WORLD_SIZE", least=1)
    ranks = int(rank_environment(env)["WORLD_SIZE"])
    return ranks if "RANK" in env or _is_srun(env) else None


_START = "start the ranks with deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE to run one process"


def _whole(env: Mapping[str, str], name: str, *, least: int, most: int | None = None, because: str = "") -> int:
    """The value of a variable that is a whole number from `least` to `most`.

    Raises:
        ConfigError: it is not; names the variable and says which numbers it may have, and `because` of what.
    """
    text = env[name]
    number = int(text) if re.fullmatch("-?[0-9]{1,18}", text, re.ASCII) else None
    if number is None or number < least or (most is not None and number > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"the environment variable {name}={text[:40]!r} must be a whole number {span}{because}: "
                          "correct or unset it")
    return number


def _of_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """As deepspeed and torchrun set them."""
    ranks = _whole(env, "WORLD_SIZE", least=1)
    world = {"RANK": str(_rank(env, "RANK", "WORLD_SIZE", ranks)), "WORLD_SIZE": str(ranks),
             "LOCAL_RANK": str(_whole(env, "LOCAL_RANK", least=0)) if "LOCAL_RANK" in env else "0"}
    missing = [key for key in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(key)]
    if ranks == 1:  # needs neither address nor port
        return world | {key: env[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in env}
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE are set but {', '.join(missing)} are not: {_START}")
    return world | {"MASTER_ADDR": env["MASTER_ADDR"], "MASTER_PORT": str(_port(env))}


def _of_srun(env: Mapping[str, str]) -> dict[str, str]:
    name, ranks = _tasks(env)
    world = {"RANK": str(_rank(env, "SLURM_PROCID", name, ranks)), "WORLD_SIZE": str(ranks),
             "LOCAL_RANK": str(_whole(env, "SLURM_LOCALID", least=0)) if "SLURM_LOCALID" in env else "0"}
    return world if ranks == 1 else world | _slurm_master(env)


def _rank(env: Mapping[str, str], name: str, of: str, ranks: int) -> int:
    return _whole(env, name, least=0, most=ranks - 1, because=f", because {of} is {ranks}")


def _port(env: Mapping[str, str]) -> int:
    return _whole(env, "MASTER_PORT", least=1, most=65535)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `node[007-010,12],gpu1` is `node007`."""
    try:
        return expand(nodelist)[0]
    except ValueError as error:
        raise ConfigError(f"SLURM's list of nodes, {error}: set MASTER_ADDR to the host of rank 0") from None


def _nodelist(env: Mapping[str, str]) -> str:
    """The hosts of this step, which may be some of the job's; empty: nobody has said it."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")  # the last is the old name of the second
    return next((env[name] for name in names if env.get(name)), "")


def expected_hosts(env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Where each rank should be, by what the launcher says: SLURM of the tasks of a step, deepspeed of its hostfile.
    Empty where it says nothing, or nothing that fits this rank."""
    if _is_srun(env) and env.get("SLURM_PROCID", "0") == env.get("RANK", env.get("SLURM_PROCID")):
        return _hosts_of_step(env)
    for process in launcher_processes():
        with suppress(psutil.Error, ValueError, AttributeError):
            for word in process.cmdline():
                if word.startswith("--world_info="):
                    hosts = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
                    return dict(enumerate(host for host, slots in hosts.items() for _ in slots))
    return {}


def _hosts_of_step(env: Mapping[str, str]) -> dict[int, str]:
    try:
        hosts = expand(_nodelist(env))
        counts = tasks_by_host(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", ""))
    except ValueError:
        return {}
    found = dict(enumerate(host for host, count in zip(hosts, counts, strict=False) for _ in range(count)))
    # Ranks may be dealt out in another order (--distribution); then each of the others may be anywhere.
    node, rank = env.get("SLURM_NODEID", ""), int(env["SLURM_PROCID"])
    own = hosts[int(node)] if node.isdecimal() and int(node) < len(hosts) else None
    local = rank - sum(counts[:int(node)]) if own is not None else -1
    fits = len(found) == _tasks(env)[1] and found.get(rank) == own and str(local) == env.get("SLURM_LOCALID")
    return found if fits else {}


def _is_srun(env: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but it is one process: only a step has a SLURM_STEP_ID.
    in_batch_script = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    return "SLURM_PROCID" in env and "SLURM_NTASKS" in env and not in_batch_script


def _tasks(env: Mapping[str, str]) -> tuple[str, int]:
    """The number of tasks of this step, behind the variable that says it: an interactive shell of salloc is a step of
    one task inside a job of many."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return name, _whole(env, name, least=1)


def step_id(env: Mapping[str, str] = os.environ) -> str:
    """The job step, which is what its ranks have in common; empty: not started by srun."""
    return f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}" if _is_srun(env) else ""


def alone_in_a_job(env: Mapping[str, str] = os.environ) -> str | None:
    """What to say where one process runs in a job that has more tasks; None: nothing."""
    if "RANK" in env or not _is_srun(env) or _tasks(env)[1] != 1 or env["SLURM_NTASKS"] == "1":
        return None
    return (f"one process in a job of {env['SLURM_NTASKS']} tasks: this is a shell of the job; start with srun to use "
            "them all")


def _slurm_master(env: Mapping[str, str]) -> dict[str, str]:
    if not env.get("MASTER_ADDR") and not _nodelist(env):
        raise ConfigError("srun started this rank, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: "
                         "export MASTER_ADDR=<first host of the job>")
    address = env.get("MASTER_ADDR") or first_host(_nodelist(env))
    # Steps that share a host need different ports; every rank of a step must derive the same one.
    job, step = (_whole(env, name, least=0) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _port(env) if env.get("MASTER_PORT") else 20000 + (job + 1009 * step) % 20000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:5]  # python -u -m deepspeed.launcher.launch
    except psutil.Error:  # it has ended, or is another user's
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)
