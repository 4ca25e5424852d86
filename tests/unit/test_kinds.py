"""Kinds of mixers: a third one, of the tests alone, is a file and a line, and everything that asks about kinds has it:
configuration, table of weights, costs, exports, refusals."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hyena_dist.cli.pretrain import main
from hyena_dist.config.errors import ConfigError, UserError
from hyena_dist.config.mixers import MIXERS
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert import read_model, to_published, write_model
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.flops import flops, parts, recomputed_flops
from hyena_dist.costs.memory import training_memory
from hyena_dist.costs.roofline import PARTS, fewest
from hyena_dist.model.config import hyena_config
from hyena_dist.model.kinds import check
from hyena_dist.model.kinds.hyena import HyenaKind
from hyena_dist.model.loss import token_loss
from hyena_dist.model.megatron import megatron_config
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.train.optimizer import parameter_groups
from tests.mean import MeanKind, MeanMixer

LENGTH, BATCH = 40, 2
TABLE = {"H": HyenaMixer, "X": MeanMixer}
UNCOUNTED = ("short_conv", "long_conv", "attention", "mean")
"""Parts that torch's counter does not know, or counts otherwise."""


@pytest.fixture(autouse=True)
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "X", "tests.mean")


def section(pattern: str = "HXA", **values: object) -> ModelSection:
    return ModelSection(**{"num_layers": 3, "hidden_size": 16, "max_seq_len": LENGTH, "filter_order": 8,
                           "num_attention_heads": 2, "embed_dropout": 0.0, "layer_pattern": pattern, **values})


def config(pattern: str = "HXA", **parallel: int) -> Config:
    return Config(model=section(pattern), parallel=ParallelSection(**parallel),
                  data=DataSection(shards="s", seq_len=32), train=TrainSection(run_dir="r"))


def ids() -> torch.Tensor:
    return torch.randint(7, 11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def test_letters_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert section("XXH").layer_kinds == "XXH"
    monkeypatch.delitem(MIXERS, "X")
    with pytest.raises(ValueError, match=r"may hold only H \(hyena\) and A \(attention\), got 'HXA'$"):
        section()


def test_every_weight_has_the_entry_of_its_kind() -> None:
    """Also where kinds have weights of one name: in_proj is of Hyena's gates, and of this kind's gate and value."""
    model = HyenaModel(hyena_config(section(), params_dtype=torch.float64), seed=3)
    table = model.placement()
    assert table["layers.0.mixer.in_proj.weight"].parts == ("x0", "x1", "v")
    assert table["layers.1.mixer.in_proj.weight"].parts == ("gate", "value")
    assert [type(layer.mixer) for layer in model.layers][:2] == list(TABLE.values())
    shift = model.layers[1].mixer.shift
    assert not table["layers.1.mixer.shift"].weight_decay
    assert 0 < shift.abs().max() <= 0.5
    for kind, number in (("H", 1), ("X", 2)):  # a mixer that is built alone has the same values
        alone = TABLE[kind](hyena_config(section(), params_dtype=torch.float64), number, seed=3)
        inside = dict(model.layers[number - 1].mixer.named_parameters())
        assert all(torch.equal(weight, inside[name]) for name, weight in alone.named_parameters())


def test_it_trains() -> None:
    model = HyenaModel(hyena_config(section()))
    optimizer = torch.optim.SGD(parameter_groups(model.named_parameters(), model.placement(), 0.1), lr=0.5)
    losses = []
    for _ in range(3):
        total, count = token_loss(model(ids()), ids())
        losses.append(total.item())
        (total / count).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.layers[1].mixer.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("pattern", ["X", "HXA"])
def test_costs_are_those_of_the_built_model(pattern: str) -> None:
    found = section(pattern)
    model = HyenaModel(hyena_config(found))
    assert parameters(found) == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids())
    counted = flops(found, LENGTH, BATCH)
    attention = counted.get("attention", 0.0) * 2 * LENGTH / (LENGTH + 1)  # torch counts the whole square
    products = sum(count for name, count in counted.items() if name not in UNCOUNTED)
    assert counter.get_total_flops() == products + attention
    assert recomputed_flops(found, LENGTH, BATCH, "selective") > 0
    memory = training_memory(found, LENGTH, BATCH, device="cpu")
    assert memory.saved > training_memory(replace(found, num_layers=2), LENGTH, BATCH, device="cpu").saved
    least = fewest(found, LENGTH, BATCH)
    assert list(least)[-1] == "mean"
    assert least["mean"].bytes == pattern.count("X") * (3 // len(pattern)) * 8 * 4 * BATCH * LENGTH * 16
    assert set(least) - set(PARTS) == {"mean"}
    assert parts(found, LENGTH)["mean"].flops > 0


def test_layouts_of_others_are_asked_whether_they_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = section("HX")
    model = HyenaModel(hyena_config(found), seed=3)
    refused = r"has no mean layers \(model.layer_pattern\): keep this model as safetensors or a checkpoint$"
    with pytest.raises(UserError, match=f"^the published code {refused}"):
        to_published(model)
    for layout in ("published", "huggingface"):
        with pytest.raises(UserError, match=refused) as caught:
            write_model(tmp_path / layout, layout, found, model)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / layout).exists()
    with pytest.raises(ConfigError, match="has mean layers, and hyena_layer_spec makes Hyena layers only"):
        megatron_config(replace(found, embed_dropout=0.0))
    for layout in ("safetensors", "checkpoint"):
        write_model(tmp_path / layout, layout, found, model)
        again, read, _ = read_model(tmp_path / layout)
        assert again == found
        assert all(torch.equal(read.state_dict()[name], weight) for name, weight in model.state_dict().items())
    monkeypatch.setattr(HyenaKind, "exports", frozenset({"published"}))  # each layout is asked for itself
    plain = section("H")
    write_model(tmp_path / "plain", "published", plain, HyenaModel(hyena_config(plain)))
    with pytest.raises(UserError, match="^Hugging Face's code has no hyena layers"):
        write_model(tmp_path / "port", "huggingface", plain, HyenaModel(hyena_config(plain)))


def test_what_it_refuses_is_said_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = config("X", context=3)
    with pytest.raises(ConfigError, match=r"global_batch_size .*; model.hidden_size \(16\) is not a multiple of "
                                          r"parallel.tensor x parallel.context \(3\), .*: use 15 or 18$"):
        check(replace(wrong, train=replace(wrong.train, global_batch_size=7, micro_batch_size=2)), world_size=3)
    three = Groups(context=Axis(None, 0, 3))
    with pytest.raises(ConfigError, match=r"^model.hidden_size \(16\) .*: use 15 or 18$"):
        build_model(config("X"), three)
    monkeypatch.setattr(MeanKind, "refuses", lambda *_: ())  # the control
    check(wrong, world_size=3)


@pytest.mark.parametrize(("pattern", "groups", "message"), [
    ("A", Groups(tensor=Axis(None, 0, 4)), r"num_attention_heads \(2\) .*\(4\): use 4$"),
    ("A", Groups(context=Axis(None, 0, 4)), r"num_attention_heads \(2\) is not a multiple of .* \(4\): use 4$"),
    ("H", Groups(context=Axis(None, 0, 2)), r"parallel.overlap_groups \(3\): set parallel.overlap_groups to 2 or 4$")])
def test_a_model_is_refused_before_it_is_built(pattern: str, groups: Groups, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config(pattern, overlap_groups=3), groups)
    assert build_model(config(pattern, overlap_groups=3), Groups.single()), "the control: one rank splits nothing"


def test_checking_imports_no_framework() -> None:
    """A mistake is told at once, also on a machine that has little. The control: what a mixer is made of is imported
    when it is asked for."""
    code = ("import sys; from hyena_dist.config.schema import *; from hyena_dist.model.kinds import check, mixer_kind; "
            "config = Config(model=ModelSection(layer_pattern='HA'), data=DataSection(shards='s'), "
            "train=TrainSection(run_dir='r')); check(config, world_size=1); heavy = {'torch', 'megatron', 'scipy'}; "
            "print(sorted(heavy & sys.modules.keys())); mixer_kind('H').module(); "
            "print(sorted(heavy & sys.modules.keys()))")
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0] == "[]"
    assert found.stdout.splitlines()[-1] != "[]"


def test_the_rules_of_a_kind_are_of_models_that_have_it() -> None:
    """One token is too short for two ranks of short convolutions, and long enough for this kind."""
    short = config("X", context=2)
    short = replace(short, data=replace(short.data, seq_len=2, val_seq_len=2))
    check(short, world_size=2)
    with pytest.raises(ConfigError, match=r"data.seq_len \(2\) is too short"):
        check(replace(short, model=section("HX")), world_size=2)


def test_a_dry_run_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{shards: s}}\ntrain: {{run_dir: {tmp_path}/r}}\n")
    assert main(["--config", str(path), "--dry-run", "model.layer_pattern=X", "parallel.context=3"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.fullmatch(r"error: model.hidden_size \(128\) is not .* \(3\), .*: use 126 or 129", said[0])
