"""Weights and models on a device: published ones are read from any, and a run is evaluated there."""

from pathlib import Path

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import save_checkpoint
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert import from_published, to_published
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.evaluate import evaluate
from tests.dist.test_checkpoint import DictEngine
from tests.gpu.devices import CPU, DEVICES

SECTION = ModelSection(num_layers=1, hidden_size=16, max_seq_len=256, filter_order=8, embed_dropout=0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_published_weights_may_be_on_a_device_or_on_several(device: torch.device) -> None:
    model = build_model(Config(model=SECTION), Groups.single()).to(device)
    config, state = to_published(model)
    for keys in (set(state), {key for key in state if "pos_emb" in key}, {key for key in state if "freq" in key}):
        found = from_published(config, {key: value.to(device if key in keys else CPU) for key, value in state.items()})
        for name, parameter in found.named_parameters():
            assert parameter.device == CPU
            assert torch.equal(parameter, model.get_parameter(name).cpu()), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_evaluated_on_the_device_and_to_the_cpus_number(device: torch.device, shards: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model=SECTION, data=DataSection(shards=str(shards), seq_len=256, val_seq_len=256),
                    train=TrainSection(run_dir=str(tmp_path)))
    model = build_model(config, Groups.single())
    zeros = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    engine = DictEngine({name: {"weight": weight.detach(), "exp_avg": zeros[name], "exp_avg_sq": zeros[name]}
                         for name, weight in model.named_parameters()})
    save_checkpoint(step_directory(tmp_path / "checkpoints", 1), engine, model.placement(), Groups.single(),
                    {"step": 1, "identity": identity(config)})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = evaluate(tmp_path).model
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() > before, "it was evaluated elsewhere"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found == pytest.approx(evaluate(tmp_path).model, rel=1e-5)
