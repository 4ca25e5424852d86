"""How long people wait for the first word: the answer of each command to --help, and the banner of a run. In seconds of
CPU, which a neighbour on the machine hardly moves, and of the clock where those count too."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COMMANDS = [*sorted((ROOT / "launchers").glob("*.py")), *sorted((ROOT / "shards").glob("*.py"))]
LAST_LINE = " memory "
"""In the last line of the banner, after the time."""


class StartRow(NamedTuple):
    """One command."""

    side: str
    cpu_seconds: float
    """Median over the rounds, of user and system together."""


def run(*, rounds: int = 5) -> list[StartRow]:
    """Measure every command; the first turn, which fills the disk's cache, does not count."""
    return [StartRow(str(path.relative_to(ROOT)),
                     statistics.median([_cpu_seconds(path) for _ in range(rounds + 1)][1:])) for path in COMMANDS]


class BannerRow(NamedTuple):
    """From the start of a rank to the end of what it says first."""

    side: str
    seconds: float
    cpu_seconds: float


def run_banner(*, rounds: int = 5) -> list[BannerRow]:
    """Measure the quickstart's, whose shards need not be there; the first turn, which fills the disk's cache, does not
    count."""
    turns = [_to_the_banner() for _ in range(rounds + 1)][1:]
    seconds, cpu_seconds = zip(*turns, strict=True)
    return [BannerRow("launchers/pretrain.py to the end of its banner", statistics.median(seconds),
                      statistics.median(cpu_seconds))]


def _to_the_banner() -> tuple[float, float]:
    """Raises AssertionError: there is no banner."""
    with tempfile.TemporaryDirectory() as directory:
        started, said, seconds = time.monotonic(), "", 0.0
        process = subprocess.Popen([sys.executable, "launchers/pretrain.py", "--config", "configs/quickstart.yaml",
                                    f"train.run_dir={directory}/run", f"data.shards={directory}/none"], cwd=ROOT,
                                   stderr=subprocess.PIPE, encoding="utf-8")
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                said += line
                if LAST_LINE in line:
                    seconds = time.monotonic() - started
                    process.kill()
                    break
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert seconds, f"pretrain.py says no banner: {said}"
    return seconds, used.ru_utime + used.ru_stime


def _cpu_seconds(path: Path) -> float:
    """Raises AssertionError: the command does not answer."""
    process = subprocess.Popen([sys.executable, str(path), "--help"], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{path} --help ends with status {process.returncode}"
    return used.ru_utime + used.ru_stime
