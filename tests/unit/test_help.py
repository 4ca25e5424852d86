"""--help answers at once: nothing that takes long to import is imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.start import COMMANDS, ROOT
from hyena_dist.cli.main import COMMANDS as CALLED
from hyena_dist.cli.main import main

HEAVY = {"torch", "numpy", "scipy", "deepspeed", "megatron", "triton", "webdataset", "tensorboard", "matplotlib",
         "safetensors", "transformers"}
SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(*command: str) -> set[str]:
    """The packages that a command has imported at its end, which must be one of status 0."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=False,
                          cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("imported:")[2].split())


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_imports_nothing_heavy(path: Path) -> None:
    assert imported(str(path), "--help") & HEAVY == set()


@pytest.mark.parametrize("command", ["", *CALLED])
def test_help_of_the_installed_command_imports_nothing_heavy(command: str) -> None:
    assert imported(str(ROOT / "hyena_dist/cli/main.py"), *filter(None, [command]), "--help") & HEAVY == set()


def test_all_that_score_can_do_is_named_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    entry = capsys.readouterr().out.partition("          score ")[2].partition("          convert ")[0]
    named = ("variants", "report", "perplexity", "distance", "substitutions")
    assert [word for word in named if word not in entry] == []


def test_what_is_heavy_is_seen() -> None:
    """The control: a command that does its work imports some of it."""
    assert imported("launchers/bench.py", "conv", "--lengths", "16", "--width", "2", "--tokens", "16",
                    "--dry-run") >= {"torch", "numpy"}
