"""How fast ranks can talk: a copy on each, an all-reduce and an all-to-all within a host and between hosts."""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MEGABYTES = 16
REPETITIONS = 3


def measure(store: dist.Store, rank: int, hosts: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The rates as rows of `what`, `where` and `gigabytes_per_second`, of the slowest rank. Collective.

    Args:
        store: of all ranks.
        hosts: of each rank.
        seconds: what a collective may take.

    Raises:
        RuntimeError: the ranks cannot talk, or not in that time.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    rows = [{"what": "copy", "where": hosts[rank], "gigabytes_per_second": _rate(_copy(device), device)}]
    ranks = len(hosts)
    if ranks == 1:
        return rows
    limit = timedelta(seconds=seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("bandwidth", store), rank=rank, world_size=ranks,
                            timeout=limit)
    try:
        first = hosts.index  # the first rank of a host stands for it
        leaders = [number for number in range(ranks) if first(hosts[number]) == number]
        wanted = [(f"within {host}", [number for number in range(ranks) if hosts[number] == host])
                  for host in dict.fromkeys(hosts)] + [(f"between {len(leaders)} hosts", leaders)]
        for where, members in wanted:
            if len(members) < 2:
                continue
            group = dist.new_group(members, timeout=limit)  # of all ranks, also those that are not in it
            if rank not in members:
                continue
            for what, action in (("all-reduce", _all_reduce(group, device)),
                                 ("all-to-all", _all_to_all(group, len(members), device))):
                rows.append({"what": what, "where": where, "gigabytes_per_second": _rate(action, device)})
        everything: list[list[dict[str, Any]]] = [[]] * ranks
        dist.all_gather_object(everything, rows)
    finally:
        dist.destroy_process_group()
    return slowest([row for of_rank in everything for row in of_rank])


def slowest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slowest of the rows of one `what` and `where`, in the order in which they came."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        other = found.setdefault((row["what"], row["where"]), row)
        if row["gigabytes_per_second"] < other["gigabytes_per_second"]:
            found[row["what"], row["where"]] = row
    return list(found.values())


def _rate(action: Callable[[], object], device: torch.device) -> float:
    action()
    best = float("inf")
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return MEGABYTES * 2**20 / 1e9 / best


def _bytes(device: torch.device) -> torch.Tensor:
    """Float32 [2**20 * MEGABYTES / 4]."""
    return torch.zeros(MEGABYTES * 2**18, device=device)


def _copy(device: torch.device) -> Callable[[], object]:
    source, target = _bytes(device), _bytes(device)
    return lambda: target.copy_(source)


def _all_reduce(group: Any, device: torch.device) -> Callable[[], object]:
    tensor = _bytes(device)
    return lambda: dist.all_reduce(tensor, group=group)


def _all_to_all(group: Any, members: int, device: torch.device) -> Callable[[], object]:
    size = MEGABYTES * 2**18 // members * members
    source, target = torch.zeros(size, device=device), torch.zeros(size, device=device)
    return lambda: dist.all_to_all_single(target, source, group=group)
