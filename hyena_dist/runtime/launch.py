"""Joins this process to the others, under whichever launcher started it."""

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError, agreed, first_sentence
from hyena_dist.runtime.launcher import (
    alone_in_a_job,
    collective_timeout,
    expected_hosts,
    rank_environment,
    step_id,
    take_off_quotes,
)
from hyena_dist.runtime.peers import name_places

logger = logging.getLogger(__name__)

_REMEDY = "a rank has ended, its log says why, or was not started; DEEPSPEED_TIMEOUT sets the minutes to wait"

NOTE_SECONDS = 30.0
"""Until it is logged which ranks have not come."""

LOOK_SECONDS, FOLLOW_SECONDS = 1.0, 5.0
"""Between two looks whether another rank has failed to join; and from then on, for this rank's own error, which may say
more."""

_FAILED = "failed to join"

_ANOTHER_PORT = ("choose another with deepspeed --master_port PORT, torchrun --master-port PORT, or MASTER_PORT=PORT "
                 "before srun")
_PORT_REMEDIES = {"EADDRINUSE": f"another run has the port: {_ANOTHER_PORT}",
                  "EACCES": f"only the system may use a port that low: {_ANOTHER_PORT}"}
"""By what torch's store says of a port that it cannot open."""


def init_distributed(timeout: timedelta | None = None, *, dump_dir: Path | None = None) -> torch.device:
    """Initialise the default process group (nccl on CUDA, else gloo) and return this rank's device, already selected.

    Works under `deepspeed`, `torchrun` and `srun`; plain `python` is one process of its own.

    Args:
        timeout: of a collective; None: `collective_timeout()`.
        dump_dir: where NCCL's flight recorder writes nccl-rank-N after a time-out, if the directory exists by then.

    Raises:
        ConnectionError: the ranks did not find each other in time.
        ConfigError: the launcher's environment is incomplete, there are more ranks than devices on this machine, or
            two ranks share a GPU.
    """
    take_off_quotes()
    timeout = timeout or collective_timeout()
    environment = rank_environment(os.environ)
    if note := alone_in_a_job():
        logger.warning(note)
    device = _select_device(environment)
    os.environ.update(environment)  # DeepSpeed reads LOCAL_RANK, torch the others
    if not dist.is_initialized():
        _flight_recorder(device, dump_dir)
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        met, places = meet(rank, ranks, timeout)
        ours, store = dist.PrefixStore("hyena_dist", met), dist.PrefixStore("default_pg", met)
        if device.type == "cuda":
            with _together(ours, rank, ranks):
                _refuse_shared_devices(device, ours, rank, ranks)
                dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=timeout,
                                        device_id=device)
        else:
            with _joining(rank, ranks, expected_hosts(), places), _together(ours, rank, ranks):
                dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
                dist.barrier()  # a rank may have reached all others that did not reach each other
    return device


def open_store(rank: int, ranks: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, which the first rank keeps; under torchrun it is there already. Waits
    for no other rank than the first.

    Raises:
        RuntimeError: of torch; it cannot be opened, or not be reached in that time.
    """
    if ranks == 1:  # no port to find, no name to resolve
        return dist.HashStore()
    keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, keeper, timeout,
                          wait_for_workers=False, multi_tenant=True)
    store.set_timeout(timeout)
    return store


def meet(rank: int, ranks: int, timeout: timedelta) -> tuple[dist.Store, list[tuple[str, list[str]]]]:
    """The store that this run's ranks have in common, once all of them are there, and the host of each with its
    addresses. Collective. A wait of more than half a minute is logged, with those that it is for.

    Raises:
        ConnectionError: they were not in time; names those that are missing.
    """
    hosts = expected_hosts()
    with _joining(rank, ranks, hosts):
        shared = open_store(rank, ranks, timeout)
    # The ranks of another step of the job may come to the same port: each step has keys of its own.
    store = dist.PrefixStore(f"step {step_id()}", shared)
    # The first rank, who may keep the store, ends last, so that all can still ask who is missing.
    started, patience = time.monotonic(), timeout.total_seconds() + (0.0 if rank else 1.0)
    with _joining(rank, ranks, hosts):
        store.set(f"here/{rank}", json.dumps([socket.gethostname(), addresses()]))
        while missing := _missing(store, ranks, min(NOTE_SECONDS, max(started + patience - time.monotonic(), 0.01))):
            waited = time.monotonic() - started
            who = name_places(missing, hosts)
            if waited >= patience:
                raise ConnectionError(f"rank {rank} (host {socket.gethostname()}) waited {waited:.0f} s for {who}, of "
                                      f"{ranks} ranks: {_REMEDY}")
            if rank == 0:
                logger.warning("waiting for %s since %.0f s, until %.0f s (DEEPSPEED_TIMEOUT)", who, waited,
                               patience)
        places = [json.loads(value) for value in store.multi_get([f"here/{other}" for other in range(ranks)])]
    return store, places


def _missing(store: dist.Store, ranks: int, seconds: float) -> list[int]:
    """The ranks that have not come in this time."""
    keys = [f"here/{other}" for other in range(ranks)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return [other for other, key in enumerate(keys) if not store.check([key])]
    return []


def addresses() -> list[str]:
    """Those of this machine's interfaces, but for the ones that every machine has."""
    return [address.address for of_interface in psutil.net_if_addrs().values() for address in of_interface
            if address.family in (socket.AF_INET, socket.AF_INET6) and not address.address.startswith(("127.", "::1"))]


@contextmanager
def _joining(rank: int, ranks: int, hosts: Mapping[int, str],
             places: Sequence[tuple[str, list[str]]] = ()) -> Iterator[None]:
    """A context in which a rendezvous that fails is one line, with names for the addresses in it.

    Args:
        hosts: where each rank should be, as far as it is known.
        places: host and addresses of each rank, if they are known already.
    """
    try:
        yield
    except RuntimeError as error:  # of torch's store, or of gloo
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        remedy = next((remedy for sign, remedy in _PORT_REMEDIES.items() if sign in str(error)), _REMEDY)
        first = f"rank 0 ({f'host {hosts[0]}, ' if 0 in hosts else ''}{where})"
        others = first if rank and not places else f"the other of {ranks} ranks at {where}"
        raise ConnectionError(f"rank {rank} (host {socket.gethostname()}) could not meet "
                              f"{_whose(str(error), places) or others} ({first_sentence(error)}): "
                              f"{remedy}") from error


@contextmanager
def _together(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """A context that this rank does not stay in once another has failed in it, or the store is gone with the first one.
    A connection is made by one of two ranks; where it cannot, the other would wait for it five times the time-out."""
    if ranks == 1:
        yield
        return
    over = threading.Event()
    threading.Thread(target=_follow, args=(store.clone(), rank, over),  # type: ignore[attr-defined]
                     name="together", daemon=True).start()
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            store.compare_set(_FAILED, "", f"rank {rank} (host {socket.gethostname()})")  # the first one's counts
        if rank == 0:
            time.sleep(2 * LOOK_SECONDS)  # who may keep the store: the others are to hear it
        raise
    finally:
        over.set()


def _follow(store: dist.Store, rank: int, over: threading.Event) -> None:
    """End this process some seconds after another has said that it failed, unless it is over by then. Its main thread
    cannot: it waits inside gloo or NCCL."""
    while not over.wait(LOOK_SECONDS):
        try:
            if not store.check([_FAILED]):
                continue
            who = store.get(_FAILED).decode()
        except RuntimeError:
            who = "rank 0"
        if over.wait(FOLLOW_SECONDS):
            return
        sys.stderr.write(f"error: rank {rank} (host {socket.gethostname()}) ends because {who} has, who could not meet "
                         "another rank: its own line says why\n")
        sys.stderr.flush()
        os._exit(1)


def _whose(text: str, places: Sequence[tuple[str, list[str]]]) -> str:
    """The ranks, with their host, of an address of another host in a text; empty: there is none."""
    found = {rank: host for rank, (host, its) in enumerate(places) if host != socket.gethostname()
             and any(re.search(rf"(?<![\w.:]){re.escape(address)}(?![\w.])", text) for address in its)}
    return name_places(found, found)


DRIVER = Path("/dev/nvidiactl")
"""There where a machine has NVIDIA's driver."""


def _select_device(environment: dict[str, str]) -> torch.device:
    """Select the CUDA device of this rank. Where the launcher shows each rank only its own one, that is device 0."""
    if not torch.cuda.is_available():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        # The first three ask for the CPU. Without NVIDIA's driver it is the launcher that has set it.
        if shown not in ("", "-1", "NoDevFiles") and DRIVER.exists():
            logger.warning("CUDA_VISIBLE_DEVICES=%s names no GPU that torch can use on this machine: the run is on the "
                           "CPU; correct or unset it where there is one", shown)
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


def lone_devices(places: Sequence[Place]) -> str | None:
    """What to say where the first rank sees one GPU, though other ranks of its machine have others; None: nothing."""
    others = len({place.gpu for place in places if place.host == places[0].host})
    if others == 1:
        return None
    return (f"rank 0 sees one of the {others} GPUs that ranks of {places[0].host} have, as with --gpus-per-task=1: "
            "NCCL may copy between them through the host then; --gpus-per-node shows every rank all of them")


def _refuse_shared_devices(device: torch.device, store: dist.Store, rank: int, ranks: int) -> None:
    """Before NCCL would, in many lines and only at the first collective. Every rank tells the others its place."""
    places = gather_places(Place(str(torch.cuda.get_device_properties(device).uuid), socket.gethostname(),
                                 os.environ.get("NCCL_HOSTID", "")), store, rank, ranks)
    problem = shared_device(places)
    if problem is not None:
        raise agreed(ConfigError(problem))
    if rank == 0 and torch.cuda.device_count() == 1 and (note := lone_devices(places)):
        logger.warning(note)


def gather_places(own: Place, store: dist.Store, rank: int, ranks: int) -> list[Place]:
    """Those of all ranks, by rank. Collective, over the store alone: there is no process group yet."""
    store.set(f"place/{rank}", json.dumps(own))
    return [Place(*json.loads(text)) for text in store.multi_get([f"place/{other}" for other in range(ranks)])]


def _flight_recorder(device: torch.device, dump_dir: Path | None) -> None:
    """Let NCCL's flight recorder say which collective hung; these are torch's own switches and the user's word wins.
    That an NCCL error or time-out ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3) is torch's default."""
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        if dump_dir is not None and "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dump_dir / "nccl-rank-"))
