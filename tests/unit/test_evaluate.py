"""Which checkpoint of a run is evaluated."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import save_checkpoint
from hyena_dist.cli.evaluate import main, parse_args
from hyena_dist.config.errors import UserError
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.model.evaluate import SplitLoss
from hyena_dist.model.loss import perplexity
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks import evaluate
from hyena_dist.tasks.evaluate import load_run
from hyena_dist.train.report import EVALUATION
from tests.checkpoints import edit_metadata
from tests.dist.test_checkpoint import DictEngine

STEPS = {10: 1.0, 20: 2.0}
"""Validation losses: the older checkpoint is the better one."""
SCALE = 2**-6
"""All weights of a step are the step times this: by weights as large as a step's number predictions are NaN."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    section = ModelSection(num_layers=1, hidden_size=8, filter_order=4, max_seq_len=16)
    config = Config(model=section, data=DataSection(shards="none", seq_len=16), train=TrainSection(run_dir="none"))
    model = build_model(config, Groups.single())
    for step, loss in STEPS.items():
        engine = DictEngine({name: {"weight": torch.full_like(parameter, step * SCALE),
                                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                             for name, parameter in model.named_parameters()})
        save_checkpoint(step_directory(run_dir / "checkpoints", step), engine, model.placement(), Groups.single(),
                        {"step": step, "val_loss": loss, "identity": identity(config)})
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir


@pytest.mark.parametrize(("choice", "step"), [(None, 20), ("latest", 20), ("best", 10), ("PATH", 10)])
def test_a_checkpoint_is_chosen(run_dir: Path, choice: str | None, step: int) -> None:
    path = step_directory(run_dir / "checkpoints", step)
    arguments = [] if choice is None else ["--checkpoint", str(path) if choice == "PATH" else choice]
    chosen = parse_args([str(run_dir), *arguments]).checkpoint
    _, model, found = load_run(run_dir, chosen)
    assert found == path
    assert all(torch.equal(parameter, torch.full_like(parameter, step * SCALE)) for parameter in model.parameters())
    assert not model.training


def test_what_is_no_checkpoint_of_it_is_refused(run_dir: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    for choice, message in (("latest", "has no whole checkpoint: let the run"), ("best", "with a validation loss"),
                            (str(tmp_path / "nowhere"), "nowhere: no such checkpoint")):
        with pytest.raises(UserError, match=message):
            load_run(tmp_path, choice)
        assert main([str(tmp_path), "--checkpoint", choice]) == 2
        assert message in capsys.readouterr().err


def test_a_name_that_is_no_path_is_told_which_there_are(run_dir: Path) -> None:
    for choice in ("newest", "step-00000015"):
        with pytest.raises(UserError, match=f"^{choice}: no such checkpoint: use latest, best, or one that is kept in "
                                            f"{run_dir}/checkpoints .step-00000020, "):
            load_run(run_dir, choice)


def test_a_run_s_configuration_is_read_as_plain_data(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = (run_dir / "config.yaml").read_text()
    path = tmp_path / "config.yaml"
    for value in ("${oc.env:SECRET}", "'a${oc.env:SECRET}b'"):
        path.write_text(text.replace("shards: none", f"shards: {value}"))
        assert main([str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: data.shards" in error
        assert "is not replaced in a configuration" in error
        assert "hunter2" not in error
    path.unlink()
    os.mkfifo(path)
    assert main([str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    path.unlink()
    path.symlink_to("/dev/zero")
    assert main([str(tmp_path)]) == 2


def test_a_configuration_of_another_function_of_the_same_weights(run_dir: Path, tmp_path: Path) -> None:
    """As after an edit of config.yaml, or with another run's checkpoint."""
    config = load_config(run_dir / "config.yaml")
    model = build_model(config, Groups.single())
    engine = DictEngine({name: dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), parameter.detach())
                         for name, parameter in model.named_parameters()})
    save_checkpoint(step_directory(tmp_path / "checkpoints", 5), engine, model.placement(), Groups.single(),
                    {"step": 5, "identity": identity(config)})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(replace(config, model=replace(config.model, embed_dropout=0.5))))
    load_run(tmp_path)  # a run that was resumed with another dropout, which evaluates nothing else
    other = replace(config, model=replace(config.model, filter_shift=0.0))
    (tmp_path / "config.yaml").write_text(dump_config(other))
    with pytest.raises(UserError, match=r"of another model than .*model.filter_shift: saved 0.05, now 0.0"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for kept in ({}, {key: value for key, value in identity(config).items() if key != "model.filter_shift"}):
        edit_metadata(step_directory(tmp_path / "checkpoints", 5), identity=kept)
        with pytest.raises(UserError, match=r"of another model than .*model.filter_shift: saved null, now 0.05"):
            load_run(tmp_path)


def test_a_loss_beyond_the_largest_float_is_infinite_perplexity(run_dir: Path, shards: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture) -> None:
    """As in training. The control: a loss that has one."""
    assert [perplexity(loss) for loss in (0.0, 710.0, math.inf)] == [1.0, math.inf, math.inf]
    assert math.isnan(perplexity(math.nan))
    for loss, said in ((800.0, "inf"), (1.0, "2.7183")):
        monkeypatch.setattr(evaluate, "evaluate_split", lambda *_, each=loss, kinds, classes, **__: SplitLoss(
            each, 1, np.zeros((2, kinds, classes))))
        status = main([str(run_dir), "--shards", str(shards), "--must-beat-order", "0"])
        assert re.search(rf"HyenaDNA\W+{said}", capsys.readouterr().out)
        assert status == (loss > 2)
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_, kinds, classes, **__: SplitLoss(
        math.nan, 1, np.zeros((2, kinds, classes))))
    assert main([str(run_dir), "--shards", str(shards)]) == 2
    assert "its predictions are no numbers (NaN): give another checkpoint" in capsys.readouterr().err


def test_shards_that_are_not_here_name_the_option_that_says_where_they_are(
        run_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    """A run's data.shards are often relative to where it was started, which is not where it is scored."""
    monkeypatch.chdir(tmp_path)
    assert main([str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"data.shards=none is no directory here, where relative paths count from: .*--shards DIR", said)
    assert said.count("\n") == 1
    assert main([str(run_dir), "--shards", str(shards)]) == 0  # the control


def test_windows_that_the_gpu_cannot_hold_are_a_line(run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    def out_of_memory(*_: object, **__: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "evaluate_split", out_of_memory)
    assert main([str(run_dir), "--shards", str(shards)]) == 2
    said = capsys.readouterr().err
    assert "do not fit into the GPU's free memory: free some, or evaluate on the CPU with CUDA_VISIBLE_DEVICES=" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_windows_that_the_host_cannot_hold_are_a_line(run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture, error: Exception) -> None:
    def fail(*_: object, **__: object) -> float:
        raise error

    monkeypatch.setattr(evaluate, "evaluate_split", fail)
    assert main([str(run_dir), "--shards", str(shards)]) == 2
    assert "do not fit into this machine's free memory" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "is_out_of_memory", lambda _: False)  # the control: a defect is none
    with pytest.raises(type(error)):
        main([str(run_dir), "--shards", str(shards)])


def test_what_is_found_on_the_run_s_own_bases_is_kept_and_drawn(run_dir: Path, shards: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture) -> None:
    """And nothing of other shards or another split, nor where nobody may write."""
    own = tmp_path / "run"
    shutil.copytree(run_dir, own)
    text = (own / "config.yaml").read_text().replace("shards: none", f"shards: {shards}")
    (own / "config.yaml").write_text(text)
    (own / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0, "perplexity": 2.7, "tokens": 16, '
                                       '"seq_len": 16, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0, '
                                       '"peak_memory_bytes": 1}\n')
    assert main([str(own), "--shards", str(shards)]) == 0
    assert not (own / EVALUATION).exists()
    assert main([str(own)]) == 0
    assert f"written: {own / EVALUATION}, {own / 'report.png'}" in capsys.readouterr().out.replace("\n", " ")
    kept = json.loads((own / EVALUATION).read_text())
    assert (kept["split"], kept["checkpoint"], len(kept["markov"])) == ("val", "step-00000020", 7)
    assert kept["markov"][0] > kept["markov"][1] > 3
    (own / EVALUATION).unlink()
    (own / EVALUATION).mkdir()
    assert main([str(own)]) == 0
    assert "note: not kept: " in capsys.readouterr().err
