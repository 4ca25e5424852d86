"""Which checkpoint of a run is evaluated."""

from pathlib import Path

import pytest
import torch

from hyena_dist.config.errors import UserError
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config, DataSection, ModelSection, TrainSection
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.evaluate import load_run
from hyena_dist.train.checkpoint import save_checkpoint
from hyena_dist.train.checkpoint_directory import step_directory
from launchers.evaluate import main, parse_args
from tests.dist.test_checkpoint import DictEngine

STEPS = {10: 1.0, 20: 2.0}
"""Validation losses: the older checkpoint is the better one."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    section = ModelSection(num_layers=1, hidden_size=8, filter_order=4, max_seq_len=16)
    config = Config(model=section, data=DataSection(shards="none", seq_len=16), train=TrainSection(run_dir="none"))
    model = build_model(config, Groups.single())
    for step, loss in STEPS.items():
        engine = DictEngine({name: {"weight": torch.full_like(parameter, float(step)),
                                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                             for name, parameter in model.named_parameters()})
        save_checkpoint(step_directory(run_dir / "checkpoints", step), engine, model.placement(), Groups.single(),
                        {"step": step, "val_loss": loss})
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir


@pytest.mark.parametrize(("choice", "step"), [(None, 20), ("latest", 20), ("best", 10), ("PATH", 10)])
def test_a_checkpoint_is_chosen(run_dir: Path, choice: str | None, step: int) -> None:
    path = step_directory(run_dir / "checkpoints", step)
    arguments = [] if choice is None else ["--checkpoint", str(path) if choice == "PATH" else choice]
    chosen = parse_args([str(run_dir), *arguments]).checkpoint
    _, model, found = load_run(run_dir, chosen)
    assert found == path
    assert all(torch.equal(parameter, torch.full_like(parameter, step)) for parameter in model.parameters())
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
