"""A sweep runs, is killed, goes on, and loses nothing: its points are real runs, each in a process of its own."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.cli.sweep import main
from hyena_dist.cli.sweep_tables import _table
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.load import load_config
from hyena_dist.costs.flops import training_flops
from hyena_dist.runtime.signals import EXIT_REQUEUE, PROCESS
from hyena_dist.tasks.sweep.fork import launch_of
from hyena_dist.tasks.sweep.state import read_states
from hyena_dist.train.metrics import read_rows
from tests.processes import kill

ROOT = Path(__file__).parents[2]
SMALL = {"model.num_layers": 1, "model.hidden_size": 8, "model.filter_order": 8, "data.seq_len": 64,
         "data.val_tokens": 128, "train.micro_batch_size": 2, "train.global_batch_size": 2, "train.eval_every": 0,
         "train.save_every": 0, "optim.warmup_steps": 0}


def write(tmp_path: Path, shards: Path, *, steps: Any, set_keys: dict[str, Any] | None = None, **keys: Any) -> str:
    path = tmp_path / "sweep.yaml"
    settings = {**SMALL, "data.shards": str(shards), **(set_keys or {})}
    path.write_text(yaml.safe_dump({"base": "quickstart", "runs": str(tmp_path / "runs"), "set": settings,
                                    "axes": {"train.steps": steps}, **keys}))
    return str(path)


def program(code: str) -> list[str]:
    """What starts a point, where it is no training: it gets the training's arguments, and need not heed them."""
    return [sys.executable, "-c", code]


def states(tmp_path: Path) -> list[dict[str, Any]]:
    return sorted(read_states(tmp_path / "runs"), key=lambda state: state["steps"])


def test_a_point_runs_once_and_its_metric_when_it_is_asked_for(tmp_path, shards, capsys):
    metric = {"name": "files", "command": program("import os, sys; print(len(os.listdir(sys.argv[1])) > 3 and 0.25)")}
    metric["command"].append("{run_dir}")
    path = write(tmp_path, shards, steps=[2], metric=metric)
    assert main(["run", "--config", path]) == 0
    [state] = states(tmp_path)
    config = load_config(Path(state["run_dir"]) / "config.yaml")
    last = read_rows(Path(state["run_dir"]) / "metrics.jsonl")[-1]
    assert (last.split, last.step) == ("val", 2)
    assert (state["status"], state["error"], state["loss"]) == ("finished", None, last.loss)
    assert state["metric"] == {"name": "files", "value": 0.25}
    assert (state["tokens"], state["flops"]) == (256, 2 * training_flops(config.model, 64, 2))
    assert set(state["val"]["species"]) == {"worm", "phix174"} or len(state["val"]["species"]) == 0
    assert state["mfu"] is None, "a CPU has no peak that is known"
    log = Path(state["run_dir"]).parent / "log.txt"
    said = log.read_bytes()

    assert main(["run", "--config", path]) == 0
    assert (log.read_bytes(), states(tmp_path)) == (said, [state]), "what is finished is not run again"
    path = write(tmp_path, shards, steps=[2], metric={"name": "other", "command": program("print('none')")})
    assert main(["run", "--config", path]) == 1
    [failed] = states(tmp_path)
    assert (failed["status"], failed["loss"]) == ("failed", state["loss"])
    assert failed["error"].startswith("metric other: its last line is no number: see ")
    path = write(tmp_path, shards, steps=[2], metric={"name": "other", "command": program("print(2)")})
    assert main(["run", "--config", path]) == 1, "only --retry runs it again"
    assert main(["run", "--config", path, "--retry"]) == 0
    assert states(tmp_path)[0]["metric"] == {"name": "other", "value": 2}
    assert log.read_bytes() == said, "and none of them has trained again"
    capsys.readouterr()
    assert main(["status", "--config", path]) == 0
    assert "finished" in capsys.readouterr().out


FAILURES = {
    "failed": ("import sys; print('error: no bases in it', file=sys.stderr); sys.exit(2)", "failed", "no bases in it"),
    "diverged": ("import sys; print('error: step 3: loss nan, gradient norm nan, the update'); sys.exit(1)", "diverged",
                 "step 3: loss nan, gradient norm nan, the update"),
    "silent": ("import sys; sys.exit(3)", "failed", "ended with status 3, and said nothing"),
    "a defect": ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "planned", "ended by SIGKILL: it goes on with the next run of the "
                                                                 "sweep"),
    "lies": ("pass", "failed", "ended with status 0, and said nothing"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_ends_early_is_a_row_with_its_reason(name, tmp_path, shards, capsys):
    code, status, error = FAILURES[name]
    path = write(tmp_path, shards, steps=[2, 3], launch=program(code))
    assert main(["run", "--config", path, "--jobs", "2"]) == (EXIT_REQUEUE if status == "planned" else 1)
    assert [(state["status"], state["error"]) for state in states(tmp_path)] == [(status, error)] * 2
    before = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("log.txt")]
    if status != "planned":
        capsys.readouterr()
        assert main(["run", "--config", path]) == 1, "what failed is listed"
        assert [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("log.txt")] == before, "and not run again"
        assert capsys.readouterr().err.count(f"{error}: --retry runs it again") == 2


def test_a_program_that_is_not_there_fails_its_points(tmp_path, shards):
    assert main(["run", "--config", write(tmp_path, shards, steps=[2], launch=["no-such-program"])]) == 1
    assert states(tmp_path)[0]["error"].startswith("no-such-program: cannot be started (No such file or directory)")


def test_a_stop_lets_points_end_and_starts_no_more(tmp_path, shards, monkeypatch):
    code = ("import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(85))\n"
            "open('started', 'a').write('x')\ntime.sleep(60)")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, shards, steps=[2, 3, 4], launch=program(code))
    monkeypatch.setattr("hyena_dist.cli.sweep_tables.Board.show", lambda _: Path("started").exists()
                        and PROCESS.request("SIGTERM"))
    began = time.monotonic()
    assert main(["run", "--config", path]) == EXIT_REQUEUE
    assert time.monotonic() - began < 30
    assert Path("started").read_text() == "x"
    assert [(state["status"], state["error"]) for state in states(tmp_path)] == [
        ("planned", "stopped before its end: it goes on with the next run of the sweep"), ("planned", None),
        ("planned", None)]
    assert PROCESS.reason is None, "the next run is not asked to stop"


def test_two_sweeps_do_not_run_a_point_twice(tmp_path, shards, capsys):
    path = write(tmp_path, shards, steps=[2], launch=program("import sys; print('here'); sys.exit(3)"))
    assert main(["run", "--config", path]) == 1
    [state] = states(tmp_path)
    point = Path(state["run_dir"]).parent
    hold = ("import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint(flush=True)\n"
            "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", hold, point / "lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = (point / "log.txt").stat().st_mtime_ns
        assert main(["run", "--config", path, "--retry"]) == 1
        assert f"point {state['id']} is run by somebody else at the moment" in capsys.readouterr().err
        assert (point / "log.txt").stat().st_mtime_ns == said
        other.stdin.close()
    assert main(["run", "--config", path, "--retry"]) == 1
    assert (point / "log.txt").stat().st_mtime_ns > said, "control: once it is free it is run"


DAMAGE = {
    "torn": lambda text: text[: len(text) // 2], "empty": lambda text: "", "another's": lambda text: "[1]",
    "other id": lambda text: re.sub(r'"id": "\w+"', '"id": "0123456789ab"', text),
    "no such status": lambda text: text.replace('"failed"', '"done"'),
    "no number": lambda text: re.sub(r'"flops": [^,]+', '"flops": NaN', text),
    "no loss": lambda text: text.replace('"failed"', '"finished"'),
    "a key is gone": lambda text: text.replace('"steps"', '"stops"'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_is_none_is_named_and_kept(name, tmp_path, shards, capsys):
    path = write(tmp_path, shards, steps=[2], launch=program("import sys; sys.exit(3)"))
    assert main(["run", "--config", path]) == 1
    [file] = tmp_path.glob("runs/points/*/point.json")
    damaged = DAMAGE[name](file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    for command in ("run", "status"):
        capsys.readouterr()
        assert main([command, "--config", path]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {file}: is ")
        assert said.endswith("delete it, and the point goes on from the checkpoints of its run\n")
        assert said.count("\n") == 1
    assert file.read_text() == damaged
    file.unlink()
    assert main(["run", "--config", path]) == 1


def test_only_and_index_choose(tmp_path, shards, capsys):
    path = write(tmp_path, shards, steps=[2, 3], launch=program("import sys; sys.exit(3)"))
    assert main(["run", "--config", path, "--index", "1"]) == 1
    assert [state["status"] for state in states(tmp_path)] == ["planned", "failed"]
    assert main(["run", "--config", path, "--only", states(tmp_path)[0]["id"]]) == 1
    assert [state["status"] for state in states(tmp_path)] == ["failed", "failed"]
    for wrong in (["--index", "2"], ["--only", "nobody"]):
        capsys.readouterr()
        assert main(["run", "--config", path, *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"error: {' '.join(wrong)}: {path} has ")


def test_the_live_table_says_how_far_points_are(tmp_path, shards, monkeypatch):
    """Of a point that its sweep runs, of one that a killed sweep left, and of one that is finished; read from files."""
    path = write(tmp_path, shards, steps=[5, 6, 7], launch=program("import sys; sys.exit(3)"))
    assert main(["run", "--config", path]) == 1
    for state, status in zip(states(tmp_path), ("running", "running", "finished"), strict=True):
        directory = Path(state["run_dir"])
        directory.mkdir()
        row = {"split": "train", "step": 4, "loss": 1.25}
        (directory / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'step': 5})[:20]}")
        file = directory.parent / "point.json"
        file.write_text(json.dumps({**state, "status": status, "error": None, "loss": 1.5}))
    text = io.StringIO()
    alive = states(tmp_path)[0]["id"]
    Console(file=text, width=160).print(_table(states(tmp_path), {alive: (3, time.monotonic() - 60)},
                                               lambda state: state["id"] == alive))
    rows = [re.split(r"\s{2,}", line.strip())[1:] for line in text.getvalue().splitlines() if "/" in line]
    assert rows == [["running", "4/5", "1.2500", "1 min"], ["interrupted", "4/6", "1.2500"],
                    ["finished", "7/7", "1.5000"]]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for state in states(tmp_path):
        (Path(state["run_dir"]).parent / "point.json").write_text(json.dumps({**state, "status": "failed"}))
    assert main(["status", "--config", path, "--watch"]) == 0, "it ends with the last point"


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, shards, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main(["run", "--config", write(tmp_path, shards, steps=[2])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no such directory can be made (Not a directory): choose other `runs` in the sweep's file" in said


def test_a_branch_whose_origin_has_not_kept_its_step_says_so(tmp_path, shards):
    keys = {"set_keys": {"optim.schedule": "constant"}, "launch": program("import sys; sys.exit(3)")}
    path = write(tmp_path, shards, steps=[8], forks=[{"at": 4, "cooldown": 2}], **keys)
    assert main(["run", "--config", path]) == EXIT_REQUEUE
    fork, parent = states(tmp_path)
    assert (fork["status"], fork["error"]) == ("planned", f"waits for step 4 of {parent['id']}")
    file = Path(parent["run_dir"]).parent / "point.json"
    file.write_text(json.dumps({**parent, "status": "finished", "loss": 1.3}))
    assert main(["run", "--config", path]) == 1
    assert states(tmp_path)[0]["error"].startswith(f"{parent['id']} has kept no checkpoint of step 4: fork it at a ")


def everything(pid: int) -> list[int]:
    """A process and all that it has started."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["everything", "the sweep alone"])
def test_a_sweep_that_is_killed_goes_on(whom, tmp_path, shards):
    """Two points at a time, killed with SIGKILL once both have saved; what they learn is what they learn unbroken."""
    path = write(tmp_path, shards, steps=[400, 401], set_keys={"train.save_every": 20})
    command = [sys.executable, "launchers/sweep.py", "run", "--config", path, "--jobs", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len({file.parents[3] for file in tmp_path.glob("runs/points/*/run/checkpoints/step-????????/COMPLETE")}) < 2:
        assert time.monotonic() < deadline, "no checkpoints"
        assert first.poll() is None
        time.sleep(0.1)
    kill(everything(first.pid) if whom == "everything" else [first.pid])
    first.wait()
    assert {state["status"] for state in states(tmp_path)} == {"running"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    for state in states(tmp_path):
        rows = [row for row in read_rows(Path(state["run_dir"]) / "metrics.jsonl") if row.split == "train"]
        assert [row.step for row in rows] == list(range(1, state["steps"] + 1))
        history = (Path(state["run_dir"]) / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["begins"] for line in history] == [True, False], "it went on from its checkpoint"
        straight = tmp_path / f"straight-{state['steps']}"
        config = Path(state["run_dir"]).parent / "config.yaml"
        run = subprocess.run([sys.executable, "launchers/pretrain.py", "--config", config,
                              f"train.run_dir={straight}"], cwd=ROOT, capture_output=True, check=False, timeout=400)
        assert run.returncode == 0
        expected = [row.loss for row in read_rows(straight / "metrics.jsonl") if row.split == "train"]
        assert [row.loss for row in rows] == expected


@pytest.mark.slow
def test_a_fork_is_the_branch_that_train_resume_makes(tmp_path, shards, monkeypatch):
    """Bit for bit, of the command and of the file's forks; and both are the run that cools down there by itself."""
    # A sweep of one point at a time gives it all threads, and sums over other numbers of them are rounded otherwise.
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    wsd = {"optim.schedule": "wsd", "optim.cooldown": 2, "train.save_every": 4, "train.keep_every": 4}
    path = write(tmp_path, shards, steps=[12], set_keys=wsd, forks=[{"at": 8, "cooldown": 2}])
    assert main(["run", "--config", path]) == 0
    parent = next(state for state in states(tmp_path) if state["forked_from"] is None)
    assert main(["fork", str(Path(parent["run_dir"]).parent), "--at", "4", "--cooldown", "3"]) == 0
    forks = {state["fork_at"]: state for state in states(tmp_path) if state["forked_from"] == parent["id"]}
    for at, cooldown in ((8, 2), (4, 3)):
        state, by_hand, straight = forks[at], tmp_path / f"by-hand-{at}", tmp_path / f"straight-{at}"
        assert (state["status"], state["steps"]) == ("finished", at + cooldown)
        assert state["tokens"] == parent["tokens"] // 12 * (at + cooldown)
        assert state["flops"] == parent["flops"] / 12 * (at + cooldown)
        keys = [f"train.steps={at + cooldown}", f"optim.cooldown={cooldown}"]
        config = ["--config", str(Path(parent["run_dir"]) / "config.yaml"), *keys]
        origin = f"{parent['run_dir']}/checkpoints/step-{at:08d}"
        for directory, more in ((by_hand, f"train.resume={origin}"), (straight, "train.resume=auto")):
            run = subprocess.run([sys.executable, "launchers/pretrain.py", *config, f"train.run_dir={directory}", more],
                                 cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=300)
            assert run.returncode == 0, run.stderr
            assert weights(directory, at + cooldown) == weights(Path(state["run_dir"]), at + cooldown)
        assert weights(Path(parent["run_dir"]), 12) != weights(by_hand, at + cooldown), "control"
    assert main(["fork", parent["run_dir"], "--at", "5", "--cooldown", "3"]) == 2, "it has no such checkpoint"


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint: weights and moments."""
    reader = TensorReader(step_directory(run_dir / "checkpoints", step))
    return {key: value.numpy().tobytes() for key, value in reader.read(reader.shapes).items()}


def test_a_fork_starts_as_its_sweep_does_but_no_program_that_a_file_names(tmp_path, shards, capsys):
    code = "import sys; sys.exit(3)"
    assert main(["run", "--config", write(tmp_path, shards, steps=[8], launch=program(code), ranks=2,
                                              set_keys={"train.global_batch_size": 4})]) == 1
    resolved, point = tmp_path / "runs" / "sweep.yaml", Path(states(tmp_path)[0]["run_dir"]).parent
    (point / "run").mkdir(exist_ok=True)
    shutil.copy(point / "config.yaml", point / "run")
    capsys.readouterr()
    assert main(["fork", str(point), "--at", "4", "--cooldown", "2"]) == 2
    assert re.search(rf"error: {resolved}: launch has words that may be any program.* -c .*sys.exit\(3\).*: "
                     "give --launch with what starts 2 ranks\n$", capsys.readouterr().err)

    def left(*words: str) -> Path:
        resolved.write_text(yaml.safe_dump({"launch": list(words), "ranks": 2}))
        return resolved
    for words in ((), ("torchrun", "--nproc-per-node=2", "--master-port={port}"), ("deepspeed", "--num_gpus=2"),
                  ("torchrun", "--standalone", "--nproc_per_node=2")):
        assert launch_of(left(*words)) == (words, 2)
    for words in (("sh", "-c", "true"), ("torchrun", "their.py"), ("torchrun", "--no-python", "sh"), ("./torchrun",),
                  ("torchrun", "-m", "theirs"), ("torchrun", "--nproc-per-node=2\nsh"), ("\x1b[31mtorchrun",)):
        with pytest.raises(ConfigError, match="may be any program") as raised:
            launch_of(left(*words))
        assert str(raised.value).isprintable(), "the file's words are shown as text"
    for text in ("", "launch: 3\nranks: 1", "ranks: 2", "a: [", "launch: []\nranks: x", "launch: []\nranks: 0",
                 "launch: [[]]\nranks: 1", "[" * 5000):
        resolved.write_text(text)
        with pytest.raises(ConfigError, match="sweep.yaml: cannot be read .*: run the sweep again, which writes it"):
            launch_of(resolved)


def test_a_fork_of_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["fork", str(tmp_path), "--at", "5", "--cooldown", "3"]) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}: is no run directory (it has no config.yaml): give that of "
                                       "a run or of a point\n")
