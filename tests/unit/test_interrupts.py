"""Ctrl-C and SIGTERM end a command without a traceback, from its first line on."""

import io
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks.start import ROOT

INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
COMMANDS = {
    "evaluate": ["launchers/evaluate.py", "run"],
    "convert": ["launchers/convert.py", "run", "there"],
    "build": ["shards/build.py", "a.fa", "--out", "there"],
    "verify": ["shards/verify.py", "shards"],
    "show": ["shards/show.py", "shards"],
    "hyena-dist convert": ["hyena_dist/cli/main.py", "convert", "run", "there"],
    "hyena-dist verify": ["hyena_dist/cli/main.py", "verify", "shards"],
    "pretrain --dry-run": ["launchers/pretrain.py", "--config", "quickstart", "--dry-run"],
}
CONTROL = ["-c", "import torch"]


def interrupted_at_an_import(tmp_path: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that is interrupted as it imports the first of the libraries that take long."""
    for library in ("rich", "torch", "numpy"):
        (tmp_path / f"{library}.py").write_text(INTERRUPTED)
    there = [str(ROOT / command[0]), *command[1:]] if command[0] != "-c" else command
    return subprocess.run([sys.executable, *there], cwd=tmp_path, capture_output=True, text=True, check=False,
                          timeout=60, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path: Path, command: str) -> None:
    done = interrupted_at_an_import(tmp_path, COMMANDS[command])
    assert done.stderr == ""
    assert done.returncode == -signal.SIGINT


def test_python_by_itself_writes_one(tmp_path: Path) -> None:
    done = interrupted_at_an_import(tmp_path, CONTROL)
    assert "Traceback" in done.stderr
    assert "KeyboardInterrupt" in done.stderr


WORK = [
    ("evaluate", "hyena_dist.tasks.evaluate.evaluate", ["run"]),
    ("convert", "hyena_dist.convert.read_model", ["run", "there"]),
    ("build", "hyena_dist.data.build.build", ["a.fa", "--out", "there"]),
    ("verify", "hyena_dist.data.verify.verify", ["shards"]),
    ("show", "hyena_dist.data.manifest.Manifest.load", ["shards"])]


@pytest.mark.parametrize(("command", "function", "arguments"), WORK)
def test_an_interrupt_of_the_work_is_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                command: str, function: str, arguments: list[str]) -> None:
    def interrupted(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    assert import_module(f"hyena_dist.cli.{command}").main(arguments) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("command", "function", "arguments"), [
    *WORK, ("generate", "hyena_dist.tasks.generate.sequences.prompt_of_text", ["--from", "run", "--bases", "9", "--out",
                                                                              "made.fa"])])
def test_sigterm_closes_what_is_shown_and_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                  command: str, function: str, arguments: list[str]) -> None:
    """By its default a process ends at once: in a terminal the cursor, which a bar hides, would stay hidden."""
    terminal = io.StringIO()

    def terminated(*_arguments: object, **_keywords: object) -> None:
        assert callable(signal.getsignal(signal.SIGTERM)), "the default would end these tests"
        with Progress(console=Console(file=terminal, force_terminal=True)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(function, terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert import_module(f"hyena_dist.cli.{command}").main(arguments) == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "a second one does not disturb the end"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "stopped by SIGTERM: give the same command again\n"
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().rindex(shown) > terminal.getvalue().rindex(hidden)
