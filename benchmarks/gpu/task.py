"""A part as its own process sees it: its directory, its deadline, and what it notes.

    python -m benchmarks.gpu.task PART --work DIR --seconds N [--tiny]

Every finding is written at once, so that a part that is stopped leaves what it had.
"""

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINDINGS = "findings.jsonl"


class TimeUp(BaseException):
    """The part has had its seconds."""


@dataclass
class Task:
    """Of one part.

    Args:
        work: a directory of its own.
        seconds: from now until it should have ended.
        tiny: sizes for a CPU, to try the check itself.
    """

    work: Path
    seconds: float
    tiny: bool
    failed: bool = False
    _started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.seconds - (time.monotonic() - self._started)

    def note(self, line: str = "", *, ok: bool | None = None, **numbers: Any) -> None:
        """Write down a finding: a line for the summary, whether it is as it should be, and its numbers."""
        self.failed |= ok is False
        print(line or json.dumps(numbers, default=str), flush=True)
        with (self.work / FINDINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"line": line, "ok": ok, **numbers}, default=str) + "\n")

    def attempt(self, label: str, work: Callable[[], None]) -> None:
        """Run a piece of a part; what it raises is noted, and does not stop the next one."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the next piece is to be asked too
            traceback.print_exc()
            self.note(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", ok=False)

    def command(self, command: Sequence[str | Path], log: Path, **environment: str) -> int:
        """Run a command until the deadline, with what it says in a file. Returns its status; 124: no time was left."""
        if self.left() <= 0:
            return 124
        with log.open("ab") as file:
            try:
                return subprocess.run([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, check=False,
                                      timeout=max(0.0, self.left()), env=os.environ | environment).returncode
            except subprocess.TimeoutExpired:
                return 124


def read(work: Path) -> list[dict[str, Any]]:
    """The findings in a part's directory; a last one that was cut short is left out."""
    return read_lines(work / FINDINGS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines, the whole ones."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def device() -> Any:
    """Where the check runs."""
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_seconds(work: Callable[[], object], *, rounds: int = 5, warm: int = 2, at_most: float = 5.0) -> float:
    """Of a call, by CUDA events on a GPU, after `warm` calls; measuring ends after `at_most` seconds."""
    from benchmarks.timing import timed
    where = device()
    found: list[float] = []
    for _ in range(warm):
        work()
    started = time.monotonic()
    while len(found) < rounds and (not found or time.monotonic() - started < at_most):
        found.append(timed(work, where)[0])
    return statistics.median(found)


def outcome(numbers: Mapping[str, float], form: str = ",.2f") -> str:
    """`a 1.00, b 2.00`"""
    return ", ".join(f"{name} {format(value, form)}" for name, value in numbers.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\b")
    signal.signal(signal.SIGTERM, _time_is_up)
    task = Task(args.work, args.seconds, args.tiny)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        task.attempt(args.part, lambda: importlib.import_module(f"benchmarks.gpu.{args.part}").run(task))
    except TimeUp:
        task.note("out of time", ok=False)
    finally:
        _end_descendants()
    sys.stdout.flush()
    os._exit(int(task.failed))  # a thread or a group that hangs must not hold up the next part


def _time_is_up(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_descendants()  # threads wait for them
    raise TimeUp


def _end_descendants() -> None:
    """Ranks that a launcher has put into sessions of their own too."""
    import psutil
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
