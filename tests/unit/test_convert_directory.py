"""Models in directories: every format to every other, bit for bit; what is refused; nothing half written."""

import errno
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hyena_dist.checkpoint.directory import read_metadata, step_directory
from hyena_dist.checkpoint.format import load_checkpoint, save_checkpoint
from hyena_dist.cli.convert import main
from hyena_dist.cli.pretrain import main as pretrain
from hyena_dist.config.load import load_config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import FORMATS, from_published, read_model, to_published, write_model
from hyena_dist.convert.huggingface import from_huggingface
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.groups import Axis, Groups
from tests.checkpoints import edit_metadata, flip
from tests.compare import rel

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, np.ndarray]]:
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    weights = {key.removeprefix("weight/"): torch.from_numpy(value) for key, value in arrays.items()
               if key.startswith("weight/")}
    return json.loads((GOLDEN / f"{name}.json").read_text()), weights, arrays


def published_directory(path: Path) -> Path:
    """The golden model as its authors publish: a Lightning checkpoint with more in it than weights."""
    config, weights, _ = golden("tiny")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": {f"model.{key}": value for key, value in weights.items()},
                "optimizer_states": [{"step": torch.tensor(3)}]}, path / "weights.ckpt")
    return path


def same_weights(model: HyenaModel, weights: Mapping[str, torch.Tensor]) -> bool:
    _, state = to_published(model)
    return all(torch.equal(state[key], value) for key, value in weights.items())


def small(**changes: Any) -> tuple[ModelSection, HyenaModel]:
    section = replace(ModelSection(num_layers=2, hidden_size=8, filter_order=4, max_seq_len=20), **changes)
    model = HyenaModel(hyena_config(section))
    initialize(model, model.placement(), Axis(), seed=1)
    return section, model


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in every format, from the published one."""
    directory = tmp_path_factory.mktemp("formats")
    source = published_directory(directory / "source")
    for format in FORMATS:
        assert main([str(source), str(directory / format), "--to", format]) == 0
    return directory


@pytest.mark.parametrize("second", FORMATS)
def test_every_format_to_every_other_is_bit_exact(first: Path, tmp_path: Path, second: str) -> None:
    _, weights, arrays = golden("tiny")
    for format in FORMATS:
        assert main([str(first / format), str(tmp_path / format), "--to", second]) == 0
        section, model, _ = read_model(tmp_path / format)
        assert (section.num_layers, section.hidden_size, section.inner_size) == (2, 32, 128)
        assert (section.max_seq_len, section.filter_seq_len, section.vocab_size) == (130, None, 12)
        assert same_weights(model, weights), format
    ids = torch.from_numpy(arrays["input_ids"].astype(np.int64))[:, :-1]
    error = rel(model(ids), arrays["logits"])
    print(f"twice converted, to {second}: logits differ from the published by {error:.1e}, tolerance 2e-5")
    assert error < 2e-5
    weights["backbone.ln_f.bias"] = torch.nextafter(weights["backbone.ln_f.bias"], torch.tensor(1.0))
    assert not same_weights(model, weights), "control: the last bit of one weight"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FORMATS)


def test_a_section_of_other_values_survives_every_format(tmp_path: Path) -> None:
    section, model = small(ffn_hidden_size=12, embed_dropout=0.25, resid_dropout=0.125, vocab_size=14,
                           filter_sine_freq=2.5, filter_num_inner_mlps=1, filter_emb_dim=7)
    for format in FORMATS:
        write_model(tmp_path / format, format, section, model)
        found, again, _ = read_model(tmp_path / format)
        assert found == section
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_operator_survives_where_our_own_code_reads_it(tmp_path: Path) -> None:
    section, model = small(hyena_order=3, short_conv_kernel=4, filter_shift=0.0, tie_embeddings=False)
    for format in ("huggingface", "published", "huggingface"):
        write_model(tmp_path / "next", format, section, model)
        section_found, model, _ = read_model(tmp_path / "next")
        assert section_found == section
        shutil.rmtree(tmp_path / "next")


def test_what_only_own_formats_hold(tmp_path: Path) -> None:
    section, model = small(layer_pattern="HA", num_attention_heads=2, filter_seq_len=10, filter_shift=0.0)
    for format in ("safetensors", "checkpoint"):
        write_model(tmp_path / format, format, section, model)
        found, again, _ = read_model(tmp_path / format)
        assert found == section
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_hugging_face_layout(first: Path) -> None:
    """The keys, shapes and constants of the published port, from its listing."""
    config = json.loads((first / "huggingface" / "config.json").read_text())
    assert config["model_type"] == "hyenadna"
    assert (config["d_model"], config["n_layer"], config["d_inner"], config["max_seq_len"]) == (32, 2, 128, 130)
    assert (config["emb_dim"], config["activation_freq"], config["hyena_order"], config["vocab_size"]) == (3, 10, 2, 12)
    assert config["tie_word_embeddings"] is True
    state = load_file(first / "huggingface" / "model.safetensors")
    mixer = "hyena.backbone.layers.1.mixer."
    assert {key.removeprefix(mixer): list(value.shape) for key, value in state.items() if key.startswith(mixer)} == {
        "in_proj.weight": [96, 32], "in_proj.bias": [96], "out_proj.weight": [32, 32], "out_proj.bias": [32],
        "short_filter.weight": [96, 1, 3], "short_filter.bias": [96], "filter_fn.bias": [32],
        "filter_fn.pos_emb.z": [1, 130, 3], "filter_fn.pos_emb.t": [1, 130, 1],
        "filter_fn.modulation.deltas": [1, 1, 32],
        "filter_fn.implicit_filter.0.weight": [64, 3], "filter_fn.implicit_filter.0.bias": [64],
        "filter_fn.implicit_filter.1.freq": [1, 64],
        "filter_fn.implicit_filter.2.weight": [64, 64], "filter_fn.implicit_filter.2.bias": [64],
        "filter_fn.implicit_filter.4.weight": [64, 64], "filter_fn.implicit_filter.4.bias": [64],
        "filter_fn.implicit_filter.6.weight": [32, 64]}
    assert torch.equal(state["lm_head.weight"], state["hyena.backbone.embeddings.word_embeddings.weight"])
    assert {key for key in state if "layers" not in key} == {
        "lm_head.weight", "hyena.backbone.embeddings.word_embeddings.weight", "hyena.backbone.ln_f.weight",
        "hyena.backbone.ln_f.bias"}


def test_hugging_face_binary_file_and_bare_backbone(first: Path, tmp_path: Path) -> None:
    _, weights, _ = golden("tiny")
    shutil.copytree(first / "huggingface", tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    bare = {key.removeprefix("hyena."): value for key, value in state.items() if key != "lm_head.weight"}
    torch.save(bare, tmp_path / "hf" / "pytorch_model.bin")
    assert same_weights(read_model(tmp_path / "hf")[1], weights)
    half = {key: value.bfloat16() for key, value in bare.items()}
    torch.save(half, tmp_path / "hf" / "pytorch_model.bin")
    rounded = {key: value.bfloat16().float() for key, value in weights.items() if "pos_emb" not in key
               and "deltas" not in key}
    assert same_weights(read_model(tmp_path / "hf")[1], rounded), "narrower types widen exactly"


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_stranger_s_pickle_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, owned = tmp_path / "source", tmp_path / "owned"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "hyenadna", "d_model": 8, "n_layer": 1}))
    torch.save({"weight": _Attack(owned)}, source / "pytorch_model.bin")
    assert main([str(source), str(tmp_path / "dest")]) == 2
    assert "pytorch_model.bin: holds no tensors by name" in capsys.readouterr().err
    assert not owned.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert owned.exists(), "control: the pickle does act when it is loaded"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints, of which the older is the better, from before the order of windows that is now."""
    for step, loss in ((10, 1.0), (20, 2.0)):
        section, model = small()
        with torch.no_grad():
            model.final_norm.bias.fill_(float(step))
        identity = {f"model.{key}": value for key, value in asdict(section).items()} | {"train.seed": 1}
        save_checkpoint(step_directory(tmp_path / "run" / "checkpoints", step), _Weights(model), model.placement(),
                        Groups.single(), {"step": step, "val_loss": loss, "identity": identity, "data": {"version": 1}})
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    return tmp_path / "run"


class _Weights:
    """A model whose optimizer has moments."""

    def __init__(self, model: HyenaModel) -> None:
        self.state = {name: {"weight": parameter.detach().clone(), "exp_avg": torch.ones_like(parameter),
                             "exp_avg_sq": torch.ones_like(parameter)} for name, parameter in model.named_parameters()}
        self.optimizer_step_count = 7
        self.frozen: frozenset[str] = frozenset()

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        return {name: fields["weight"].shape for name, fields in self.state.items()}

    def export_parameter(self, name: str) -> dict[str, torch.Tensor]:
        return self.state[name]

    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        self.state[name] = dict(state)


@pytest.mark.parametrize(("arguments", "step"), [([], 20), (["--checkpoint", "latest"], 20),
                                                 (["--checkpoint", "best"], 10)])
def test_a_run_s_checkpoint_is_chosen(run_dir: Path, tmp_path: Path, arguments: list[str], step: int) -> None:
    assert main([str(run_dir), str(tmp_path / "dest"), *arguments]) == 0
    bias = read_model(tmp_path / "dest")[1].final_norm.bias
    assert torch.equal(bias, torch.full_like(bias, step))


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_the_checkpoint_that_was_taken_is_the_one_that_is_named(run_dir: Path, tmp_path: Path, named: str,
                                                                capsys: pytest.CaptureFixture) -> None:
    """One that is damaged is passed over for the one before it."""
    older, newest = (step_directory(run_dir / "checkpoints", step) for step in (10, 20))
    source = run_dir if named == "run" else newest
    for path, dest in ((newest, tmp_path / "first"), (older, tmp_path / "second")):
        assert main([str(source), str(dest), "--to", "checkpoint"]) == 0
        assert f"from {path}: " in capsys.readouterr().out
        assert read_metadata(dest)["source"] == str(path)
        assert read_model(source)[2] == path
        flip(newest / "__0_0.distcp", 700)


def test_a_checkpoint_to_start_from(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights of the source, moments and steps of none."""
    assert main([str(run_dir), str(tmp_path / "start"), "--to", "checkpoint"]) == 0
    assert f" train.resume=weights:{tmp_path / 'start'} " in capsys.readouterr().out
    section, model = small()
    engine = _Weights(model)
    metadata = load_checkpoint(tmp_path / "start", engine, model.placement(), Groups.single())  # type: ignore[arg-type]
    assert (metadata["step"], metadata["data"], metadata["val_loss"], engine.optimizer_step_count) == (0, None, None, 0)
    assert metadata["identity"] == {f"model.{key}": value for key, value in asdict(section).items()}
    assert torch.equal(engine.state["final_norm.bias"]["weight"], torch.full((8,), 20.0))
    assert not any(fields[moment].any() for fields in engine.state.values() for moment in ("exp_avg", "exp_avg_sq"))
    assert read_metadata(step_directory(run_dir / "checkpoints", 20))["optimizer_step_count"] == 7, "control"


@pytest.mark.parametrize("changes", [
    {}, {"max_seq_len": 40_000, "filter_seq_len": 20, "embed_dropout": 1e-05, "resid_dropout": 0.25},
    {"layer_pattern": "HA", "num_attention_heads": 2, "ffn_hidden_size": 24, "vocab_size": 14}])
@pytest.mark.parametrize("config", ["quickstart", "hyenadna-32k"])
def test_the_command_that_it_prints_trains_that_model(tmp_path: Path, changes: dict[str, Any], config: str,
                                                      capsys: pytest.CaptureFixture) -> None:
    """Whatever the configuration says of model and lengths; its own data and batches stay."""
    section, model = small(**changes)
    write_model(tmp_path / "a model", "safetensors", section, model)
    dest = tmp_path / "to start" / "small"
    assert main([str(tmp_path / "a model"), str(dest), "--to", "checkpoint"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("python launchers/pretrain.py ")[2])
    assert command[:2] == ["--config", "configs/quickstart.yaml"]
    command[1] = str(ROOT / "configs" / f"{config}.yaml")
    assert pretrain([*command, "--dry-run"]) == 0
    dumped = tmp_path / "run.yaml"
    dumped.write_text(capsys.readouterr().out)
    read = load_config(dumped)
    assert read.model == section
    assert (read.data.seq_len, read.train.resume) == (section.max_seq_len, f"weights:{dest}")
    if section.max_seq_len == 20:
        without = [argument for argument in command if not argument.startswith("data.seq_len")]
        assert pretrain([*without, "--dry-run"]) == 2, "control"


def test_a_checkpoint_to_start_from_can_be_read_under_its_name(run_dir: Path, tmp_path: Path) -> None:
    """The control of those that are refused: what a name says is the step, or nothing."""
    for name in ("step-00000000", "step-7", "step-00000007b"):
        assert main([str(run_dir), str(tmp_path / name), "--to", "checkpoint"]) == 0
        assert main([str(tmp_path / name), str(tmp_path / f"{name} again")]) == 0
    assert main([str(run_dir), str(tmp_path / "step-00000007")]) == 0, "no checkpoint"


@pytest.mark.parametrize("key", ["filter_shift", "vocab_size", "ffn_hidden_size", "embed_dropout"])
def test_a_checkpoint_that_does_not_say_of_which_model_it_is(run_dir: Path, tmp_path: Path, key: str,
                                                             capsys: pytest.CaptureFixture) -> None:
    """The default of today would be another function of the same weights, silently."""
    path = step_directory(run_dir / "checkpoints", 20)
    identity = read_metadata(path)["identity"]
    edit_metadata(path, identity={name: value for name, value in identity.items() if name != f"model.{key}"})
    assert main([str(run_dir), str(tmp_path / "dest")]) == 2
    error = capsys.readouterr().err
    assert f"{path}: its metadata.json lacks model.{key} in identity" in error
    assert error.count("\n") == 1
    edit_metadata(path, identity=identity)
    assert main([str(run_dir), str(tmp_path / "dest")]) == 0, "control"


def test_extending(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = first / "source"
    for filter, length in (("keep", 130), ("stretch", 260)):
        assert main([str(source), str(tmp_path / filter), "--max-seq-len", "260", "--filter", filter]) == 0
        section, model, _ = read_model(tmp_path / filter)
        assert (section.max_seq_len, section.filter_seq_len) == (260, length)
        assert model(torch.full((1, 260), 7)).isfinite().all()
        ids = torch.randint(7, 11, (1, 130), generator=torch.Generator().manual_seed(0))
        same = torch.equal(model(ids), from_published(*golden("tiny")[:2])(ids))
        assert same == (filter == "keep"), "control: stretched filters change the logits"
    assert main([str(tmp_path / "stretch"), str(tmp_path / "out"), "--to", "published"]) == 0
    assert main([str(tmp_path / "keep"), str(tmp_path / "none"), "--to", "published"]) == 2
    assert "l_max" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _drop(path: Path, key: str) -> None:
    state = load_file(path)
    del state[key]
    save_file(state, path)


def _trained_positions(hf: Path) -> None:
    state = load_file(hf / "model.safetensors")
    state["hyena.backbone.layers.0.mixer.filter_fn.pos_emb.z"] += 0.1
    save_file(state, hf / "model.safetensors")


@pytest.mark.parametrize(("format", "damage", "message"), [
    ("safetensors", lambda d: (d / "model.safetensors").write_bytes(b"\0" * 100), "no readable safetensors file"),
    ("safetensors", lambda d: (d / "model.safetensors").unlink(), "source: no file of weights"),
    ("safetensors", lambda d: _drop(d / "model.safetensors", "final_norm.bias"), "has shape none in the weights"),
    ("safetensors", lambda d: _edit(d / "config.json", model={"hidden_size": 64}), "has shape"),
    ("safetensors", lambda d: _edit(d / "config.json", model={"hiden_size": 64}), "hiden_size"),
    ("safetensors", lambda d: _edit(d / "config.json", model={"hidden_size": "x"}), "hidden_size is 'x', not a number"),
    ("safetensors", lambda d: _edit(d / "config.json", model={"hidden_size": -1}), "greater than 0"),
    ("safetensors", lambda d: _edit(d / "config.json", model=3), "is neither of a published"),
    ("safetensors", lambda d: (d / "config.json").write_text("[]"), "holds a list, not an object"),
    ("safetensors", lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    ("safetensors", lambda d: (d / "config.json").unlink(), "without a config.json beside it"),
    ("published", lambda d: (d / "weights.ckpt").write_bytes(b"x"), "no readable file of weights"),
    ("published", lambda d: _edit(d / "config.json", layer=[]), "not a published HyenaDNA config.json"),
    ("published", lambda d: _edit(d / "config.json", n_layer="two"), "n_layer is 'two', not a number"),
    ("huggingface", lambda d: (d / "model.safetensors").unlink(), "source: no file of weights"),
    ("huggingface", lambda d: _drop(d / "model.safetensors", "hyena.backbone.ln_f.bias"), "lacks key backbone.ln_f"),
    ("huggingface", lambda d: _edit(d / "config.json", hyena_order=3, filter_shift=None), "hyena_order is 3, Hugg"),
    ("huggingface", lambda d: _edit(d / "config.json", hyena_order=3), "has shape"),
    ("huggingface", lambda d: _edit(d / "config.json", hyena_dropout=0.1), "{'hyena_dropout': 0.1}"),
    ("huggingface", lambda d: _edit(d / "config.json", max_seq_len=None), "it lacks max_seq_len"),
    ("huggingface", lambda d: _edit(d / "config.json", max_seq_len=20.0), "model: max_seq_len: Value '20.0'"),
    ("huggingface", lambda d: _edit(d / "config.json", activation_freq=-1), "model: activation_freq must be greater"),
    ("published", lambda d: _edit(d / "config.json", d_model=None), "model: d_model: Incompatible value"),
    ("published", lambda d: _edit(d / "config.json", d_model={}), "model: d_model is {}"),
    ("published", lambda d: _edit(d / "config.json", n_layer=0), "model: n_layer must be greater than 0"),
    ("published", lambda d: _edit(d / "config.json", layer={}), "it lacks layer.l_max"),
    ("published", lambda d: _edit(d / "config.json", layer={"l_max": True}), "model: layer.l_max is True"),
    ("huggingface", lambda d: _edit(d / "config.json", max_seq_len=140), "has shape [1, 20, "),
    ("huggingface", _trained_positions, "pos_emb.z differs from the published values by 1.0e-01"),
    ("checkpoint", lambda d: (d / "COMPLETE").unlink(), "no COMPLETE"),
    ("checkpoint", lambda d: (d / ".metadata").write_bytes(pickle.dumps([])), "is missing or has another size"),
])
def test_what_cannot_be_read_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture, format: str,
                                                      damage: Callable[[Path], Any], message: str) -> None:
    write_model(tmp_path / "source", format, *small())
    damage(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("changes", "format", "message"), [
    ({"layer_pattern": "HA"}, "published", "no attention layers"),
    ({"layer_pattern": "HA"}, "huggingface", "no attention layers"),
])
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict[str, Any],
                                              format: str, message: str) -> None:
    write_model(tmp_path / "source", "safetensors", *small(**changes))
    assert main([str(tmp_path / "source"), str(tmp_path / "dest"), "--to", format]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["{source}", "{source}"], "exists: choose another destination"),
    (["{tmp}/nowhere", "{tmp}/dest"], "nowhere: no such file or directory"),
    (["{source}", "{tmp}/dest", "--checkpoint", "best"], "is no run directory"),
    (["{source}", "{tmp}/dest", "--max-seq-len", "40"], "belong together"),
    (["{source}", "{tmp}/dest", "--max-seq-len", "5", "--filter", "keep"], "no extension"),
    (["{source}", "{source}/config.json/dest"], "could not be written"),
    (["{source}", "{tmp}/step-00000007", "--to", "checkpoint"], "is a name of the checkpoint of step 7"),
    (["{source}", "{tmp}/step-123456789", "--to", "checkpoint"], "is a name of the checkpoint of step 123456789"),
])
def test_mistakes_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str],
                                            message: str) -> None:
    source = tmp_path / "source"
    write_model(source, "safetensors", *small())
    assert main([argument.format(tmp=tmp_path, source=source) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                    format: str) -> None:
    write_model(tmp_path / "source", "safetensors", *small())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(tmp_path / "source"), str(tmp_path / "dest"), "--to", format]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_float64_weights_are_not_rounded_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_model(tmp_path / "source", "safetensors", *small())
    state = {key: value.double() for key, value in load_file(tmp_path / "source" / "model.safetensors").items()}
    save_file(state, tmp_path / "source" / "model.safetensors")
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    assert "float64" in capsys.readouterr().err


def test_hugging_face_defaults() -> None:
    """A config.json without the keys that have defaults."""
    config = {"d_model": 8, "n_layer": 1, "max_seq_len": 20}
    published, state = from_huggingface(config, {"hyena.backbone.x": torch.ones(1)})
    assert published["layer"] == {"shift": 0.05, "l_max": 20}
    assert published["vocab_size"] == 12
    assert list(state) == ["backbone.x"]


def test_help_shows_an_example_and_takes_no_torch() -> None:
    code = ("import sys; from hyena_dist.cli.convert import main\n"
            "try: main(['--help'])\n"
            "finally: assert 'torch' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "example: python launchers/convert.py" in result.stdout
    assert all(format in result.stdout for format in FORMATS)
