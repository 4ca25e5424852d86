"""How long each command takes to answer --help, in seconds of CPU, which a neighbour on the machine hardly moves."""

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COMMANDS = [*sorted((ROOT / "launchers").glob("*.py")), *sorted((ROOT / "shards").glob("*.py"))]


class StartRow(NamedTuple):
    """One command."""

    side: str
    cpu_seconds: float
    """Median over the rounds, of user and system together."""


def run(*, rounds: int = 5) -> list[StartRow]:
    """Measure every command; the first turn, which fills the disk's cache, does not count."""
    return [StartRow(str(path.relative_to(ROOT)),
                     statistics.median([_cpu_seconds(path) for _ in range(rounds + 1)][1:])) for path in COMMANDS]


def _cpu_seconds(path: Path) -> float:
    """Raises AssertionError: the command does not answer."""
    process = subprocess.Popen([sys.executable, str(path), "--help"], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{path} --help ends with status {process.returncode}"
    return used.ru_utime + used.ru_stime
