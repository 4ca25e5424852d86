"""What one rank sees of its machine. Nothing here talks to other ranks."""

import os
import platform
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from hyena_dist.config.errors import UserError, one_line
from hyena_dist.config.schema import Config
from hyena_dist.config.versions import library_version
from hyena_dist.data.pool import identity_of, open_pools
from hyena_dist.runtime.launch import DRIVER
from hyena_dist.runtime.startup import LIBRARIES, source_hash

SHARED_MEMORY = Path("/dev/shm")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def bounded(look: Callable[[], Any], seconds: float) -> Any:
    """What a look returns, {"error": why} where it fails, also when it does not return in time: a file server that does
    not answer holds a thread for ever, but not the doctor."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(look())
        except (OSError, UserError, RuntimeError) as error:
            found.append({"error": one_line(error)})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else {"error": f"no answer in {seconds:.0f} s"}


def gather(config: Config | None, seconds: float) -> dict[str, Any]:
    """What this rank sees, as plain data."""
    return {"host": socket.gethostname(), "versions": versions(), "gpus": gpus(), "driver": DRIVER.exists(),
            "interfaces": interfaces(), "asked": {name: os.environ[name] for name in INTERFACE_VARIABLES
                                                  if os.environ.get(name)},
            "shared_memory": bounded(lambda: shutil.disk_usage(SHARED_MEMORY).free, seconds),
            "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "towards": towards_the_first_rank(),
            "shards": None if config is None else bounded(lambda: identity_of(open_pools(config.data)), seconds)}


def versions() -> dict[str, str]:
    """What must be the same everywhere."""
    found = {name: library_version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {"python": platform.python_version(), **found, "hyena_dist's source": source_hash()}


def gpus() -> list[str]:
    """The GPUs that this rank may use, each by a number of its own in the world."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def interfaces() -> dict[str, list[str]]:
    """The IPv4 addresses of each network interface that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {name: [address.address for address in addresses if address.family == socket.AF_INET]
            for name, addresses in psutil.net_if_addrs().items() if name in up}


def towards_the_first_rank() -> str | None:
    """The address of this machine from which it would reach MASTER_ADDR; None: there is none, or no way."""
    address = os.environ.get("MASTER_ADDR")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:  # sends nothing
            route.connect((address or "127.0.0.1", 9))
            return str(route.getsockname()[0])
    except OSError:
        return None


def wall_clock() -> float:
    """The time of day here, in Unix seconds."""
    return time.time()
