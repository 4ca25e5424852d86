"""The check of a GPU machine: its plan, and parts that fail, hang or have no time. It tries itself at tiny sizes."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import machine
from benchmarks.gpu.driver import Check, dry_run
from benchmarks.gpu.machine import Unfit, slug
from benchmarks.gpu.plan import PARTS, SPARE, TOTAL, Part, chosen, fitting, seconds, share, stages
from benchmarks.gpu.task import FINDINGS, Task, read

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "launchers" / "gpu_check.py")]
DEFAULT = chosen(None)


def test_the_default_parts_fit_into_nine_minutes():
    assert sum(part.seconds for part in DEFAULT) + SPARE <= TOTAL == 540
    assert [part.name for part in DEFAULT][:2] == ["facts", "tests"]
    for part in PARTS:
        assert callable(importlib.import_module(f"benchmarks.gpu.{part.name}").run), part
    assert fitting(stages(DEFAULT, cores=1), TOTAL) == stages(DEFAULT, cores=1), "one after the other too"


def test_the_page_names_every_part_and_its_seconds():
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert [part for part in PARTS if f"| `{part.name}` | {part.seconds} |" not in page] == []


def test_parts_that_time_nothing_run_beside_each_other_where_there_are_cores():
    assert [len(stage) for stage in stages(DEFAULT, cores=2)] == [1] * len(DEFAULT)
    together = [stage for stage in stages(DEFAULT, cores=16) if len(stage) > 1]
    assert [[part.name for part in stage] for stage in together] == [["tests", "runs", "nccl"]]
    assert seconds(together[0]) == max(part.seconds for part in together[0])


@pytest.mark.parametrize("total", [30, 120, 250, 400, 540])
def test_less_time_leaves_out_the_least_important_parts(total):
    planned = stages(DEFAULT, cores=16)
    kept = fitting(planned, total)
    assert all(stage in planned for stage in kept)
    assert sum(map(seconds, kept)) <= 2 * (total - SPARE)
    left = total
    for number, stage in enumerate(kept):  # each takes all that it gets
        factor = share(stage, kept[number + 1:], left)
        assert 0.49 <= factor <= 1, stage
        left -= factor * seconds(stage)
    assert left >= SPARE - 1e-9
    assert [stage[0].name for stage in kept][:1] == ["facts"], "the most important one is kept"


def test_parts_are_chosen_by_name_in_their_own_order():
    assert [part.name for part in chosen(["bench", "facts"])] == ["facts", "bench"]
    with pytest.raises(ValueError, match="no part 'all': choose of facts, tests"):
        chosen(["all"])


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    parts = [Part("no_such_part", 60, ""), Part("runs", 0.5, ""), Part("engines", 90, "")]
    check = Check(ROOT, tmp_path / "out", tmp_path / "work", total=400, started=time.monotonic())
    assert not check.run(parts, wheels=None)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [part["status"] for part in found["parts"].values()] == ["failed", "out of time", "ok"]
    assert "No module named 'benchmarks.gpu.no_such_part'" in found["parts"]["no_such_part"]["findings"][-1]["line"]
    assert found["parts"]["runs"]["findings"][-1]["ok"] is False
    assert {"card", "driver", "versions", "commit"} <= found["machine"].keys()
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "FAIL no_such_part: ModuleNotFoundError" in summary
    assert "ZeRO-1: " in summary
    kept = sorted(path.name for path in (tmp_path / "out" / "benchmarks" / "results").iterdir())
    assert [name.rpartition(".")[2] for name in kept] == ["json", "txt"]
    assert kept[0].startswith("gpu-cpu-20")
    with tarfile.open(tmp_path / "out" / "logs.tgz") as archive:
        assert {"no_such_part.log", "runs.log", "engines/findings.jsonl"} <= set(archive.getnames())


def test_findings_are_written_at_once_and_one_cut_short_is_left_out(tmp_path):
    task = Task(tmp_path, seconds=10, tiny=True)
    task.note("a line", ok=True, number=1)
    task.attempt("a piece", lambda: 1 / 0)
    assert task.failed
    assert 9 < task.left() <= 10
    with (tmp_path / FINDINGS).open("a") as file:
        file.write('{"line": "cut')
    assert [row["line"] for row in read(tmp_path)] == ["a line", "a piece: ZeroDivisionError: division by zero"]


def test_mistakes_of_the_user_are_a_line(tmp_path):
    for arguments, said in ((["--parts", "everything"], "no part 'everything'"), (["--total", "-3"], "more than 0"),
                            (["--wheels", str(tmp_path / "none")], "no such directory"),
                            (["--wheels", str(tmp_path), "--parts", "facts"], "no wheels there")):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"OUT": str(tmp_path / "out")})
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_wheels_of_another_python_are_refused_in_a_line(tmp_path):
    (tmp_path / "thing-1.0-cp27-cp27mu-manylinux1_x86_64.whl").write_bytes(b"")
    with pytest.raises(Unfit, match=r"pip refuses them \(.*\): they are for CPython 3.12"):
        machine.install(tmp_path, tmp_path / "site")


def test_a_dry_run_needs_nothing_but_python(tmp_path):
    done = subprocess.run([sys.executable, "-S", *COMMAND[1:], "--dry-run", "--total", "100"], capture_output=True,
                          text=True, timeout=60, check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert [line.split()[0] for line in done.stdout.splitlines()][:len(DEFAULT)] == [part.name for part in DEFAULT]
    assert "left out: no time" in done.stdout
    assert "beside each other: tests + runs + nccl" in dry_run(DEFAULT, 16, TOTAL)


def test_a_cards_name_in_a_files():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("cpu") == "cpu"


@pytest.mark.slow
def test_the_whole_check_at_tiny_sizes_in_three_minutes(tmp_path):
    started = time.monotonic()
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | {"OUT": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - started < 180
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {part.name: "ok" for part in DEFAULT}
