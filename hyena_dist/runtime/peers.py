"""The other ranks of a run: what they are called, and what the processes of this machine are doing."""

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from hyena_dist.parallel.groups import Axis


@dataclass(frozen=True)
class Peer:
    """A rank, itself or another, as one rank sees it."""

    rank: int
    host: str
    pid: int
    machine: str
    """The same for ranks that can see each other's processes."""
    local: bool
    """Whether this process can see the other's process: they are on one machine."""
    process: psutil.Process | None
    """None: it is on another machine, or had ended before it could be looked at."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def alive(self) -> bool:
        """Not ended, not a zombie, and not another process of the same number; of a process of this machine."""
        return is_alive(self.process)

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger; False where it cannot be seen."""
        try:
            return self.process is not None and self.process.status() in (psutil.STATUS_STOPPED,
                                                                          psutil.STATUS_TRACING_STOP)
        except psutil.Error:
            return False


def gather_peers(axis: Axis) -> list[Peer]:
    """All ranks, by rank. Collective."""
    own = (_machine(), socket.gethostname(), os.getpid(), _started(os.getpid()))
    ranks: list[tuple[str, str, int, int]] = [own] * axis.size
    if axis.size > 1:
        dist.all_gather_object(ranks, own, group=axis.group)
    return [Peer(rank, host, pid, machine, machine == own[0], _process(pid, started) if machine == own[0] else None)
            for rank, (machine, host, pid, started) in enumerate(ranks)]


def name_ranks(which: Sequence[int], hosts: Sequence[str] | Mapping[int, str]) -> str:
    """`rank 3 (host a)`, or `ranks 2, 3 (host a)`: the first few are enough to find the machine.

    Args:
        which: of one host.
        hosts: by rank; empty where it is not known.
    """
    some = ", ".join(map(str, which[:4])) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
    return f"rank{'s' if len(which) > 1 else ''} {some}" + (f" (host {hosts[which[0]]})" if hosts else "")


def name_places(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """`rank 1, ranks 2, 3 (host birch)`: ranks of any hosts, as far as it is known where they are."""
    places: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        places.setdefault(hosts.get(rank, ""), []).append(rank)
    some = [name_ranks(which, {which[0]: host} if host else {}) for host, which in list(places.items())[:4]]
    return ", ".join(some) + (f" and {len(places) - 4} more hosts" if len(places) > 4 else "")


def is_alive(process: psutil.Process | None) -> bool:
    """Not ended, not a zombie, and not another process of the same number."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # there, though not ours
        return True


def _machine() -> str:
    """The same where a process number means the same process: one boot of one kernel, one namespace of numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int, started: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if _started(pid) == started else None
    except (psutil.NoSuchProcess, OSError):
        return None


def _started(pid: int) -> int:
    """When a process was started, in ticks since the boot: no clock that is set while the ranks start changes it."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])
