"""The tests that need a GPU, one pytest of each file, several beside each other. On a CPU a few of their cases."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.task import Task, read

ROOT = Path(__file__).parents[2]
TINY = ("tests/gpu/test_equal.py", "not gpu and not slow")
"""The file and the tests of it that a CPU runs."""
CORES_OF_ONE = 2


def run(task: Task) -> None:
    files = [TINY[0]] if task.tiny else _files()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES_OF_ONE)) as pool:
        for _ in pool.map(lambda file: one_file(task, file), files):
            pass


def _files() -> list[str]:
    """Those of tests/gpu, and then the others that hold a test marked gpu."""
    first = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    others = [path for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if path not in first and re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))]
    return [str(path.relative_to(ROOT)) for path in (*first, *others)]


def one_file(task: Task, file: str) -> None:
    """Run the tests of a file that need a GPU; every one notes how it went in a directory of its own."""
    work = task.work / Path(file).stem
    work.mkdir(exist_ok=True)
    status = task.command([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.notes",
                           "-m", TINY[1] if task.tiny else "gpu", "--basetemp", work / "tmp", file],
                          work / "pytest.log", GPU_CHECK_NOTES=str(work))
    rows = read(work)
    for row in rows:
        if row["outcome"] == "failed":
            task.note(f"{row['test']}: {row['why']}", ok=False)
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
    why = {row["why"] for row in rows if row["outcome"] == "skipped"}
    ended = "" if status in (0, 1) else f"; pytest ended with status {status}"
    task.note(f"{file}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items() if n) or 'no test ran'}"
              f"{f' ({min(why)})' if why else ''}{ended}", ok=status == 0 and counts["passed"] > 0,
              tests=[{key: row[key] for key in ("test", "outcome", "seconds", "found")} for row in rows])

