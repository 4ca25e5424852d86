"""Runs the parts of a GPU check, each in a process and within seconds of its own, and writes down what they found."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import SPARE, Part, fitting, seconds, share, stages
from benchmarks.gpu.task import read

GRACE = 4.0
"""Seconds in which a part that is told to stop writes down what it has."""
CPU_FACTOR = 3
"""How many times its seconds a part may take on a CPU, where tiny sizes take few of them and others work too."""
WIDTH = 200
LEFT_OUT = {"checkpoints", "shards", "site", "extensions", "matplotlib", "tensorboard", "__pycache__"}
"""Directories that the archive of logs does not have."""
MOST_LOG_BYTES = 12 << 20


@dataclass
class Outcome:
    """How a part went."""

    part: Part
    status: str
    """ok, failed, out of time, or why it did not run."""
    seconds: float
    budget: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> list[str]:
        """Its lines of the summary: the failures, then the others while there is room."""
        said = [row for row in self.rows if row["line"]]
        wrong = [row for row in said if row["ok"] is False]
        right = [row for row in said if row["ok"] is not False][:max(0, self.part.lines - len(wrong))]
        shown = [row for row in said if row in wrong[:2 * self.part.lines] or row in right]
        more = len(said) - len(shown)
        return [f"== {self.part.name}: {self.status}, {self.seconds:.0f} of {self.budget:.0f} s",
                *(f"{'FAIL ' if row['ok'] is False else '  '}{row['line']}"[:WIDTH] for row in shown),
                *([f"  and {more} more lines in the log"] if more else [])]


class Check:
    """A whole check: its machine, the outcomes so far, and the files that say so.

    Args:
        root: the project's checkout, which may be one that was never installed.
        out: what is kept: summary.txt, results.json, logs.tgz, and copies of the first two to be committed.
        work: everything else.
        total: seconds for all of it, from `started` (`time.monotonic()`) on.
    """

    def __init__(self, root: Path, out: Path, work: Path, *, total: float, started: float) -> None:
        self.root, self.out, self.work = root, out, work
        self._total, self._started = total, started
        self._outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def run(self, parts: Sequence[Part], wheels: Path | None) -> bool:
        """Run every part that fits into the time. Returns whether all of them ran and found all as it should be.

        Raises:
            machine.Unfit: this machine or its Python cannot run any.
        """
        site = self.work / "site" if wheels else None
        if wheels and site:
            machine.install(wheels, site)
        self._env = machine.environment(self.root, self.work, site)
        self.machine = machine.describe(self.root, self._env)
        self._say_machine()
        planned = stages(parts, self.machine["cores"] or 1)
        kept = fitting(planned, self._left())
        for stage in planned:
            if stage in kept:
                self._stage(stage, self._factor(stage, kept[kept.index(stage) + 1:]))
            else:
                for part in stage:
                    self._add(Outcome(part, "left out: no time for it", 0, 0))
        self._write(last=True)
        return all(outcome.status == "ok" for outcome in self._outcomes)

    def _left(self) -> float:
        return self._total - (time.monotonic() - self._started)

    def _factor(self, stage: Sequence[Part], later: Sequence[Sequence[Part]]) -> float:
        """Of its seconds, what a stage gets of those that are left."""
        factor, left = share(stage, later, self._left()), self._left() - SPARE
        return factor if self.machine["cuda"] else min(CPU_FACTOR * factor, left / seconds(stage))

    def _say_machine(self) -> None:
        m = self.machine
        text = (f"{m['card']} x {m['gpus'] or 1}, driver {m['driver']}, CUDA {m['cuda_version']}, NCCL {m['nccl']}, "
                f"Python {m['python']}, torch {m['versions']['torch']}, {m['cores']} cores, commit {m['commit']}, "
                f"{date.today()}")
        self._head = [text if m["cuda"] else f"tiny sizes on a CPU: {text}"]
        print(self._head[0], flush=True)

    def _stage(self, stage: Sequence[Part], factor: float) -> None:
        """Run the parts of a stage beside each other, each to its end or to that of the stage's seconds."""
        started, budget = time.monotonic(), factor * seconds(stage)
        running = {part: self._start(part, budget) for part in stage}
        stopping: dict[Part, float] = {}
        while running:
            for part, process in list(running.items()):
                now = time.monotonic()
                if process.poll() is None:
                    if part not in stopping and now - started > budget:
                        stopping[part] = now
                        process.terminate()
                    elif part in stopping and now - stopping[part] > GRACE:
                        with suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                    continue
                del running[part]
                status = "out of time" if part in stopping else "failed" if process.returncode else "ok"
                self._add(Outcome(part, status, now - started, budget, read(self.work / part.name)))
            time.sleep(0.1)

    def _start(self, part: Part, budget: float) -> subprocess.Popen[bytes]:
        work = self.work / part.name
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.task", part.name, "--work", str(work),
                   "--seconds", f"{budget:.0f}", *(() if self.machine["cuda"] else ("--tiny",))]
        with (self.work / f"{part.name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=self.root, env=self._env, stdout=log, stderr=subprocess.STDOUT,
                                    start_new_session=True)

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if outcome.status == "failed" and not any(row["ok"] is False for row in outcome.rows):
            log = (self.work / f"{outcome.part.name}.log").read_text("utf-8", errors="replace").strip().splitlines()
            last = log[-1] if log else "died without a word"
            outcome.rows.append({"line": f"{outcome.part.name}: {last}", "ok": False})
        print("\n".join(outcome.text()), flush=True)
        self._write()

    def _write(self, *, last: bool = False) -> None:
        """Summary, numbers and logs as they are now; at the end also what is to be committed."""
        spent = f"== {'done' if last else 'so far'}: {time.monotonic() - self._started:.0f} of {self._total:.0f} s"
        summary = "\n".join([*self._head, *(line for o in self._outcomes for line in o.text()), spent]) + "\n"
        results = json.dumps({"machine": self.machine, "date": str(date.today()), "parts": {
            o.part.name: {"status": o.status, "seconds": round(o.seconds, 1), "budget": round(o.budget, 1),
                          "findings": o.rows} for o in self._outcomes}}, indent=1, default=str) + "\n"
        written = {"summary.txt": summary, "results.json": results}
        if last:
            name = f"benchmarks/results/gpu-{machine.slug(self.machine['card'])}-{date.today()}"
            written |= {f"{name}.txt": summary, f"{name}.json": results}
            print(spent, flush=True)
        for file, text in written.items():
            path = self.out / file
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}")
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        self._pack()

    def _pack(self) -> None:
        """Everything that was written but large files, so that it can be brought away."""
        aside, size = self.out / ".logs.tgz", 0
        with tarfile.open(aside, "w:gz", compresslevel=3) as archive:
            for path in sorted(self.work.rglob("*")):
                inside = path.relative_to(self.work)
                if path.is_file() and not path.is_symlink() and not LEFT_OUT & set(inside.parts):
                    size += path.stat().st_size
                    if size < 10 * MOST_LOG_BYTES and path.stat().st_size < MOST_LOG_BYTES:
                        archive.add(path, str(inside))
        aside.replace(self.out / "logs.tgz")


def dry_run(parts: Sequence[Part], cores: int, total: float) -> str:
    """What would be done: the parts, their seconds and what they ask."""
    planned = stages(parts, cores)
    kept = fitting(planned, total)
    rows = [f"{part.name:12} {part.seconds:4} s  {part.asks}{'' if stage in kept else '  (left out: no time for it)'}"
            for stage in planned for part in stage]
    together = "; ".join(" + ".join(part.name for part in stage) for stage in planned if len(stage) > 1)
    return "\n".join([*rows, f"{'together':12} {sum(part.seconds for part in parts):4} s, of {total:.0f}",
                      *([f"beside each other: {together}, in all {sum(map(seconds, planned))} s"] if together else [])])
