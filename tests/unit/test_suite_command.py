"""Mistakes in the command of a suite are one line, before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from hyena_dist.cli.suite import main

HOLD = ("import sys; from pathlib import Path; from hyena_dist.runtime.run_lock import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()")


def command(directory: Path, *more: str, suite: str = "gue-dnabert2") -> list[str]:
    return [suite, "--data", str(directory), "--from", str(directory), "--out", str(directory / "out"), *more]


@pytest.mark.parametrize(("more", "said"), [
    (["--tasks", "mouse/9"], "--tasks mouse/9: gue-dnabert2 has no such task: use EMP/H3, "),
    (["--tasks", "mouse/0"], "the train file of mouse/0 is not there: its authors publish GUE.zip at https://"),
    ([], "has the files of no task: its authors publish GUE.zip at https://"),
    (["--length", "100"], "the sequences of gue-dnabert2 have a length of their own"),
    (["--length", "0"], "--length 0: must be at least 1"), (["--most", "1"], "--most 1: must be at least 2"),
    (["--data", "nowhere"], "--data nowhere: there is no such directory: its authors publish"),
    (["--from", "nowhere"], "--from nowhere: there is no such file or directory"),
    (["optim.rate=1"], "optim.rate=1"), (["optim.lr=fast"], "optim.lr"),
    (["finetune.seeds=0"], "finetune.seeds must be"),
    (["finetune.table=x"], "the suite sets finetune.table for each task"),
    (["--config", "finetune/none"], "there is no such file, and no preset of that name"),
    (["--out", "/dev/null/out"], "--out /dev/null/out: no such directory can be made"),
])
def test_mistakes_are_one_line(tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, *more)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert said in error[0]


def test_there_is_no_such_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, suite="glue")) == 2
    assert "there is no suite 'glue': use one of caduceus-gb, hyenadna-gb, caduceus-nt, " in capsys.readouterr().err


def test_one_suite_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(command(tmp_path)) == 2
        assert "another suite runs in it" in capsys.readouterr().err
        other.stdin.close()
        other.wait(30)
    main(command(tmp_path))
    assert "another suite runs in it" not in capsys.readouterr().err, "the control"
