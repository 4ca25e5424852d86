"""Joins this process to the others, under whichever launcher started it. The only place that reads a launcher's
environment."""

import itertools
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil
import torch
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError, agreed

DEFAULT_MINUTES = 10
"""How long a collective may wait for a rank. Long enough for what ranks do unequally: the first compilation of kernels,
reading a checkpoint. Short enough not to hold a cluster for an evening."""

_LAUNCHERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
                        "torchrun", "torch.distributed.run", "torch.distributed.launch"})


def init_distributed(timeout: timedelta | None = None, *, dump_dir: Path | None = None) -> torch.device:
    """Initialise the default process group (nccl on CUDA, else gloo) and return this rank's device, already selected.

    Works under `deepspeed`, `torchrun` and `srun`; plain `python` is one process of its own.

    Args:
        timeout: of a collective; None: `collective_timeout()`.
        dump_dir: where NCCL's flight recorder writes nccl-rank-N after a time-out, if the directory exists by then.

    Raises:
        ConfigError: the launcher's environment is incomplete, there are more ranks than devices on this machine, or
            two ranks share a GPU.
    """
    timeout = timeout or collective_timeout()
    environment = rank_environment(os.environ)
    device = _select_device(environment)
    os.environ.update(environment)  # DeepSpeed reads LOCAL_RANK, torch the others
    if not dist.is_initialized():
        _flight_recorder(device, dump_dir)
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if ranks == 1:  # no port to find, no name to resolve
            store: dist.Store = dist.HashStore()
        else:
            store, rank, ranks = next(dist.rendezvous("env://", rank, ranks, timeout=timeout))
            store.set_timeout(timeout)
        ours, store = dist.PrefixStore("hyena_dist", store), dist.PrefixStore("default_pg", store)
        if device.type == "cuda":
            _refuse_shared_devices(device, ours, rank, ranks)
            dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    return device


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
    """The SLURM job that this process is part of."""
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
        world = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_NTASKS"],
                 "LOCAL_RANK": env.get("SLURM_LOCALID", "0")}
        return world if env["SLURM_NTASKS"] == "1" else world | _slurm_master(env)
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


def _slurm_master(env: Mapping[str, str]) -> dict[str, str]:
    if "MASTER_ADDR" not in env and "SLURM_JOB_NODELIST" not in env:
        raise ConfigError("srun started this rank, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: "
                         "export MASTER_ADDR=<first host of the job>")
    address = env.get("MASTER_ADDR") or first_host(env["SLURM_JOB_NODELIST"])
    # Jobs that share a host need different ports; every rank of a job must derive the same one.
    port = env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _select_device(environment: dict[str, str]) -> torch.device:
    """Select the CUDA device of this rank. Where the launcher shows each rank only its own one, that is device 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
    if count == 1:
        local_rank = 0
    elif local_rank >= count:
        raise ConfigError(f"rank {environment['RANK']} is number {local_rank} on this machine, which has {count} "
                         f"devices: start at most {count} ranks per machine")
    environment["LOCAL_RANK"] = str(local_rank)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class Place(NamedTuple):
    """Where a rank computes."""

    gpu: str
    """Of one card in the world."""
    host: str
    nccl_host: str
    """What NCCL is told to take for the host; empty: the host."""


def shared_device(places: Sequence[Place]) -> str | None:
    """What is wrong with the places of all ranks, by rank: NCCL refuses two ranks on one GPU unless each of them says
    that it is another host, by an NCCL_HOSTID of its own."""
    first: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault((place.gpu, place.nccl_host), rank)
        if other != rank:
            gpus = len({p.gpu for p in places if p.host == place.host})
            return (f"ranks {other} and {rank} share GPU {place.gpu} of host {place.host}, which NCCL refuses: start "
                    f"at most {gpus} rank{'s' if gpus > 1 else ''} there")
    return None


def _refuse_shared_devices(device: torch.device, store: dist.Store, rank: int, ranks: int) -> None:
    """Before NCCL would, in many lines and only at the first collective. Every rank tells the others its place."""
    places = gather_places(Place(str(torch.cuda.get_device_properties(device).uuid), socket.gethostname(),
                                 os.environ.get("NCCL_HOSTID", "")), store, rank, ranks)
    problem = shared_device(places)
    if problem is not None:
        raise agreed(ConfigError(problem))


def gather_places(own: Place, store: dist.Store, rank: int, ranks: int) -> list[Place]:
    """Those of all ranks, by rank. Collective, over the store alone: there is no process group yet."""
    store.set(f"place/{rank}", json.dumps(own))
    return [Place(*json.loads(text)) for text in store.multi_get([f"place/{other}" for other in range(ranks)])]


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:5]  # python -u -m deepspeed.launcher.launch
    except psutil.Error:  # it has ended, or is another user's
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)


def _flight_recorder(device: torch.device, dump_dir: Path | None) -> None:
    """Let NCCL's flight recorder say which collective hung; these are torch's own switches and the user's word wins.
    That an NCCL error or time-out ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3) is torch's default."""
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        if dump_dir is not None and "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dump_dir / "nccl-rank-"))
