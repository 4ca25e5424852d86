"""Mistakes in the command of a suite are one line, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.cli.suite import main
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import write_model
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.suites import SUITES
from hyena_dist.tasks.suites.runner import Runner, Stopped
from tests.checkpoints import edit_metadata, latest

HOLD = ("import sys; from pathlib import Path; from hyena_dist.runtime.run_lock import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()")


def write(path: Path, *, add: float = 0.0, format: str = "safetensors") -> Path:
    section = ModelSection(num_layers=1, hidden_size=16, max_seq_len=64, filter_order=8)
    model = build_model(Config(model=section), Groups.single())
    with torch.no_grad():
        next(model.parameters())[0, 0] += add
    write_model(path, format, section, model)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny")


def command(directory: Path, model: Path, *more: str, suite: str = "gue-dnabert2") -> list[str]:
    return [suite, "--data", str(directory), "--from", str(model), "--out", str(directory / "out"), *more]


@pytest.mark.parametrize(("more", "said"), [
    (["--tasks", "mouse/9"], "--tasks mouse/9: gue-dnabert2 has no such task: use EMP/H3, "),
    (["--tasks", "mouse/0"], "the train file of mouse/0 is not there: its authors publish GUE.zip at https://"),
    ([], "has the files of no task: its authors publish GUE.zip at https://"),
    (["--length", "100"], "the sequences of gue-dnabert2 have a length of their own"),
    (["--length", "0"], "--length 0: must be at least 1"), (["--most", "1"], "--most 1: must be at least 2"),
    (["--data", "nowhere"], "--data nowhere: there is no such directory: its authors publish"),
    (["--from", "nowhere"], "--from nowhere: there is no such file or directory"),
    (["--from", "tests"], "tests: holds no run, no checkpoint, and no weights"),
    (["optim.rate=1"], "optim.rate=1"), (["optim.lr=fast"], "optim.lr"),
    (["finetune.seeds=0"], "finetune.seeds must be"),
    (["finetune.table=x"], "the suite sets finetune.table for each task"),
    (["--config", "finetune/none"], "there is no such file, and no preset of that name"),
    (["--out", "/dev/null/out"], "--out /dev/null/out: no such directory can be made"),
])
def test_mistakes_are_one_line(tmp_path: Path, model: Path, more: list[str], said: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, model, *more)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert said in error[0]


def test_there_is_no_such_suite(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, model, suite="glue")) == 2
    assert "there is no suite 'glue': use one of caduceus-gb, hyenadna-gb, caduceus-nt, " in capsys.readouterr().err


def test_one_suite_at_a_time(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(command(tmp_path, model)) == 2
        assert "another suite runs in it" in capsys.readouterr().err
        other.stdin.close()
        other.wait(30)
    main(command(tmp_path, model))
    assert "another suite runs in it" not in capsys.readouterr().err, "the control"


@pytest.mark.parametrize("place", ["seed-0", "seed-1/cnn", "seed-0/scratch"])
def test_a_run_that_has_outlived_its_suite_is_waited_for(tmp_path: Path, model: Path, place: str) -> None:
    """Until the suite is asked to stop, or the run has ended."""
    (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run" / "seed-0").mkdir(exist_ok=True)
    (tmp_path / "run/seed-0/metrics.jsonl").touch()
    looks = iter([None, None, "SIGTERM"])
    runner = Runner(SUITES["gue-dnabert2"], str(model), tmp_path, tmp_path, stop=lambda: next(looks))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run" / place)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Stopped):
            runner._wait_for_orphan(tmp_path / "run")
        other.stdin.close()
        other.wait(30)
    looks = iter([None])
    runner._wait_for_orphan(tmp_path / "run")


def _refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Why the command does not go on; "": it does, as far as it comes without a task's files."""
    assert main(argv) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return "" if "has the files of no task" in error else error


def test_another_model_or_configuration_under_the_same_name_is_refused(tmp_path: Path, model: Path,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier version has not noted is accepted and noted."""
    own, config, noted = tmp_path / "own", tmp_path / "own.yaml", tmp_path / "out/suite.json"
    text = Path("configs/finetune/suite.yaml").read_text("utf-8")
    config.write_text(text, encoding="utf-8")
    own.symlink_to(model)
    argv = command(tmp_path, own, "--config", str(config))
    assert not _refused(capsys, argv)
    whole = json.loads(noted.read_text("utf-8"))
    assert not _refused(capsys, argv), "the control"

    other = write(tmp_path / "other", add=1e-3)
    own.unlink()
    own.symlink_to(other)
    assert "has results of other weights than those that --from" in _refused(capsys, argv)
    assert "has results of other weights" in _refused(capsys, [*argv, "--dry-run"])
    assert json.loads(noted.read_text("utf-8")) == whole, "what is refused is not noted"
    own.unlink()
    own.symlink_to(model)
    config.write_text(text.replace("embed_dropout: 0.1", "embed_dropout: 0.2"), encoding="utf-8")
    assert "has results of model.embed_dropout 0.1, and --config" in _refused(capsys, argv)
    config.write_text(text + "# said otherwise\n", encoding="utf-8")
    assert not _refused(capsys, argv), "the control: it means the same"

    earlier = {key: value for key, value in whole.items() if key not in ("weights", "configuration")}
    noted.write_text(json.dumps(earlier), encoding="utf-8")
    assert not _refused(capsys, argv)
    assert json.loads(noted.read_text("utf-8")) == whole
    del whole["configuration"]["optim.eps"]
    noted.write_text(json.dumps(whole), encoding="utf-8")
    assert not _refused(capsys, argv)
    assert "optim.eps" in json.loads(noted.read_text("utf-8"))["configuration"]
    noted.write_text("{", encoding="utf-8")
    assert "suite.json: cannot be read" in _refused(capsys, argv)


def test_every_task_starts_from_the_weights_that_the_suite_found(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that they are of saves others meanwhile."""
    run, taken = tmp_path / "run", list[str]()
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    begun = write(step_directory(run / "checkpoints", 0), format="checkpoint")
    for task in ("mouse/0", "mouse/2"):
        (tmp_path / task).mkdir(parents=True)
        for name, base in (("train", "A"), ("dev", "C"), ("test", "G")):
            (tmp_path / task / f"{name}.csv").write_text(f"sequence,label\nAC{base},0\nGT{base},1\n", encoding="utf-8")

    def fails(_self: Runner, _run_dir: Path, arguments: list[str]) -> str:
        taken.append(arguments[0])
        saved = write(tmp_path / f"saved {len(taken)}", add=1.0, format="checkpoint")
        edit_metadata(saved, step=len(taken))
        saved.rename(step_directory(run / "checkpoints", len(taken)))
        return "as far as this test goes"

    monkeypatch.setattr(Runner, "_run", fails)
    assert main(command(tmp_path, run, "--tasks", "mouse/0", "mouse/2")) == 1
    assert taken == [f"finetune.from={begun}"] * 2
    assert latest(run / "checkpoints") == step_directory(run / "checkpoints", 2), "the control"
