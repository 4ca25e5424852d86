"""A rank that computes, watched, until there is a file `enough`: `rank.py DIRECTORY`, with torch's variables set."""

import ctypes
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.launch import init_distributed
from hyena_dist.runtime.launcher import leave
from hyena_dist.runtime.logs import RankLog
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.runtime.watchdog import Patience, Watchdog


def main() -> int:
    directory = Path(sys.argv[1])
    init_distributed()
    axis = Axis.of(dist.group.WORLD)
    patience = Patience(period=0.2, peer=1.0, still=2.0, unreachable=6.0)
    with RankLog(directory, axis.rank), StopSignal(axis) as stop, Watchdog(axis, stop, launchers=[], patience=patience):
        (directory / f"ready.{axis.rank}").touch()
        while not (directory / "enough").exists():
            if (directory / f"hold.{axis.rank}").exists():  # Python's lock: no thread of this process can do anything
                ctypes.PyDLL(None).sleep(8)
                (directory / f"hold.{axis.rank}").unlink()
            time.sleep(0.05)
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    finally:
        leave(status)
