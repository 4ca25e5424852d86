"""Weights as they lie about: under other prefixes and names, in shards, beside other heads; and what is no file."""

import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyena_dist.cli.convert import main
from hyena_dist.convert import FORMATS, read_model, write_model
from hyena_dist.model.model import HyenaModel
from tests.checkpoints import edit_metadata
from tests.unit.test_convert_directory import small

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 165012345\n"


def same(model: HyenaModel, other: HyenaModel) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def published(path: Path, **changes: Any) -> tuple[HyenaModel, dict[str, torch.Tensor]]:
    """A published directory, the model in it, and its state dict."""
    section, model = small(**changes)
    write_model(path, "published", section, model)
    state = torch.load(path / "weights.ckpt", weights_only=True)["state_dict"]
    return model, {key.removeprefix("model."): value for key, value in state.items()}


def refused(source: Path, capsys: pytest.CaptureFixture) -> str:
    assert main([str(source), str(source.parent / "dest")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not (source.parent / "dest").exists()
    return error


@pytest.mark.parametrize("format", FORMATS)
def test_an_untied_head_is_kept_by_every_format(tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture) -> None:
    section, model = small(tie_embeddings=False)
    write_model(tmp_path / "one", format, section, model)
    assert ("the published training code ties it" in caplog.text) == (format == "published")
    found, again, _ = read_model(tmp_path / "one")
    assert found == section
    assert same(model, again)
    for key in ("head.weight", "embedding.word_embeddings.weight"):
        assert key in again.state_dict()
    for other in FORMATS:
        assert main([str(tmp_path / "one"), str(tmp_path / other), "--to", other]) == 0
        assert same(model, read_model(tmp_path / other)[1])


def test_heads_that_are_tied_or_not_are_seen_by_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for tied in (True, False):
        _, state = published(tmp_path / str(tied), tie_embeddings=tied)
        assert read_model(tmp_path / str(tied))[0].tie_embeddings == tied
    config = tmp_path / "False" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert "tie_word_embeddings is true in the config.json, and lm_head.weight is another" in refused(config.parent,
                                                                                                      capsys)


def test_a_checkpoint_from_before_the_key_is_tied(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for tied in (True, False):
        write_model(tmp_path / str(tied), "checkpoint", *small(tie_embeddings=tied))
        metadata = json.loads((tmp_path / str(tied) / "metadata.json").read_text())
        identity = {key: value for key, value in metadata["identity"].items() if key != "model.tie_embeddings"}
        edit_metadata(tmp_path / str(tied), identity=identity)
    assert read_model(tmp_path / "True")[0].tie_embeddings
    assert "head.weight" in refused(tmp_path / "False", capsys), "control: the file has a head of its own"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.model.hyena.",
                                    "module._orig_mod."])
def test_what_wrappers_put_before_keys(tmp_path: Path, prefix: str) -> None:
    model, state = published(tmp_path / "source", tie_embeddings=False)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "source" / "weights.ckpt")
    assert same(model, read_model(tmp_path / "source")[1])
    state = {key.replace("layers.1.", "layers.1._orig_mod."): value for key, value in state.items()}
    torch.save({key.replace(".mlp.", ".mlp._checkpoint_wrapped_module."): value for key, value in state.items()},
               tmp_path / "source" / "weights.ckpt")
    assert same(model, read_model(tmp_path / "source")[1])
    own = {prefix.replace("hyena.", "") + key: value for key, value in model.state_dict().items()}
    write_model(tmp_path / "own", "safetensors", *small(tie_embeddings=False))
    save_file(own, tmp_path / "own" / WEIGHTS)
    assert same(model, read_model(tmp_path / "own")[1])


@pytest.mark.parametrize("key", ["score.weight", "model.score.weight", "head.output_transform.bias",
                                 "decoder.0.output_transform.weight", "classifier.weight"])
def test_the_head_of_another_task_is_left_out_aloud(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    model, state = published(tmp_path / "source")
    torch.save({"state_dict": state | {key: torch.ones(2, 8)}}, tmp_path / "source" / "weights.ckpt")
    assert same(model, read_model(tmp_path / "source")[1])
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{key} of shape [2, 8] is left out: it is a head of another task")


def test_a_classifier_of_the_port_has_no_head(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                              capsys: pytest.CaptureFixture) -> None:
    section, model = small()
    write_model(tmp_path / "source", "huggingface", section, model)
    state = load_file(tmp_path / "source" / WEIGHTS)
    del state["lm_head.weight"]
    save_file(state | {"score.weight": torch.ones(2, 8)}, tmp_path / "source" / WEIGHTS)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    found, again, _ = read_model(tmp_path / "source")
    assert found.tie_embeddings
    assert same(model, again)
    assert "score.weight of shape [2, 8] is left out" in caplog.text
    assert "has no lm_head.weight: the embedding is taken for it" in caplog.text
    save_file(state | {"scores.weight": torch.ones(2, 8)}, tmp_path / "source" / WEIGHTS)
    assert "unknown key scores.weight" in refused(tmp_path / "source", capsys), "control: only heads are left out"


@pytest.mark.parametrize("name", ["model.pt", "step_10.ckpt", "x.pth", "pytorch_model.bin", "mine.safetensors"])
@pytest.mark.parametrize("inside", [None, "state_dict", "model_state_dict", "module", "model"])
def test_a_state_dict_of_another_name(tmp_path: Path, name: str, inside: str | None,
                                      capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "source"
    model, state = published(source)
    (source / "weights.ckpt").unlink()
    if name.endswith(".safetensors"):
        save_file({key: value.clone() for key, value in state.items()}, source / name)
    else:
        # A class that is no tensor's is passed over, as in Lightning's checkpoints.
        torch.save(state if inside is None else {inside: state, "arguments": Namespace(lr=1), "step": 3}, source / name)
    for where in (source, source / name):
        assert same(model, read_model(where)[1])
    shutil.move(source / "config.json", tmp_path / "config.json")
    for where in (source, source / name):
        error = refused(where, capsys)
        assert f"{source / name}: without a config.json beside it nothing says of which model: put it there" in error


def test_which_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "source"
    model, state = published(source)
    (source / "weights.ckpt").unlink()
    for name in ("a.pt", "b.pt"):
        torch.save(state, source / name)
    assert f"{source} has several files of weights (a.pt, b.pt): name the one that is meant" in refused(source, capsys)
    assert same(model, read_model(source / "b.pt")[1])
    torch.save(model, source / "a.pt")
    assert "a.pt: holds no tensors by name" in refused(source / "a.pt", capsys)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS, "weights.ckpt"])
def test_of_which_library_a_file_is_its_content_says(tmp_path: Path, kind: str, name: str) -> None:
    source = tmp_path / "source"
    model, state = published(source)
    (source / "weights.ckpt").unlink()
    if kind == "safetensors":
        save_file({key: value.clone() for key, value in state.items()}, source / name)
    else:
        torch.save(state, source / name)
    assert same(model, read_model(source)[1])


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "message"), [
    (b'{"error": "Repository not found"}', "is text that begins with"),
    (b"Invalid username or password.", "and no file of weights: fetch that file again"),
    (b"\x1f\x8b\x08" + bytes(60), "is compressed by gzip: convert it with `gzip -dc "),
    (b"\xfd7zXZ\0" + bytes(60), "is compressed by xz: convert it with `xz -dc "),
    (b"@\x01\x02" + bytes(60), "it is cut short or damaged"),  # not FASTQ
    (b"PK\x03\x04" + bytes(60), "it is cut short or damaged")])
def test_what_is_no_file_of_weights_is_named_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture, name: str,
                                                         content: bytes, message: str) -> None:
    source = tmp_path / "source"
    published(source)
    (source / "weights.ckpt").unlink()
    (source / name).write_bytes(content)
    error = refused(source, capsys)
    assert f"error: {source / name}: " in error
    assert message in error


def test_weights_of_two_kinds_in_one_directory_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    _, state = published(source)
    read_model(source)
    assert "are read from" not in caplog.text
    other, newer = published(tmp_path / "other")
    save_file({key: value.clone() for key, value in newer.items()}, source / WEIGHTS)
    assert same(other, read_model(source)[1])
    assert f"{source}: its weights are read from {WEIGHTS}, and not from weights.ckpt" in caplog.text


@pytest.mark.parametrize("names", [[], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_directory_without_any_model(tmp_path: Path, capsys: pytest.CaptureFixture, names: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in names:
        (source / name).write_text("{}")
    assert f"{source}: holds no run, no checkpoint, and no weights with their config.json" in refused(source, capsys)
    (source / "metadata.json").write_text("{}")
    assert f"{source}: it has no COMPLETE" in refused(source, capsys)


def test_defaults_of_a_configuration_written_by_hand_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section, model = small()
    write_model(tmp_path / "source", "safetensors", section, model)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    read_model(path.parent)
    assert "defaults are taken" not in caplog.text
    del config["model"]["filter_shift"]
    path.write_text(json.dumps(config))
    read_model(path.parent)
    assert f"{path}: says nothing of some keys of the model" in caplog.text
    assert "defaults are taken: filter_shift=0.05" in caplog.text


@pytest.mark.parametrize("format", ["published", "huggingface", "safetensors"])
def test_what_is_wrong_with_a_model_says_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                       format: str) -> None:
    write_model(tmp_path / "source", format, *small())
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    (config["model"] if "model" in config else config)["num_layers" if "model" in config else "n_layer"] = 7
    path.write_text(json.dumps(config))
    error = refused(tmp_path / "source", capsys)
    assert error.startswith(f"error: {tmp_path / 'source'}: ")
    assert "is 7, and the file has the weights of" in error


@pytest.mark.parametrize("strange", [3, None, "text", [torch.zeros(1)]])
def test_what_stands_among_weights_and_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                        strange: Any) -> None:
    source = tmp_path / "source"
    _, state = published(source)
    for content in ({**state, "global_step": strange}, {"state_dict": {**state, "global_step": strange}}):
        torch.save(content, source / "weights.ckpt")
        error = refused(source, capsys)
        assert "weights.ckpt: 'global_step' stands among its weights and is no tensor by name (1 such in all)" in error


def shards(source: Path, state: Mapping[str, torch.Tensor], ending: str, count: int = 3) -> list[str]:
    """A model in files as transformers writes them, without their index."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        part = {key: state[key].clone() for key in sorted(state)[number::count]}
        save_file(part, source / name) if ending == "safetensors" else torch.save(part, source / name)
    return names


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, HyenaModel, list[str], Path]:
    section, model = small(tie_embeddings=False)
    source = tmp_path / "source"
    write_model(source, "huggingface", section, model)
    state = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    names = shards(source, state, request.param)
    stem = WEIGHTS if request.param == "safetensors" else "pytorch_model.bin"
    index = source / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {
        key: names[number % 3] for number, key in enumerate(sorted(state))}}))
    return source, model, names, index


def test_shards(sharded: tuple[Path, HyenaModel, list[str], Path], capsys: pytest.CaptureFixture) -> None:
    source, model, names, index = sharded
    assert same(model, read_model(source)[1])
    assert same(model, read_model(index)[1])
    content = (source / names[1]).read_bytes()
    (source / names[1]).write_text(POINTER)
    assert f"{source / names[1]}: is a git-lfs pointer to the file" in refused(source, capsys)
    (source / names[1]).unlink()
    assert f"{source / names[1]}: no such file, and {index.name} lists" in refused(source, capsys)
    shutil.copy(source / names[0], source / names[1])
    assert f"{source / names[1]}: has " in refused(source, capsys)
    (source / names[1]).write_bytes(content[: len(content) // 2])
    assert f"{source / names[1]}: no readable" in refused(source, capsys)
    (source / names[1]).write_bytes(content)
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"another.weight": names[2]}}))
    assert f"{source / names[2]}: has no another.weight" in refused(source, capsys)
    for wrong in ({}, {"weight_map": []}, {"weight_map": {"x": "../x.bin"}}, {"weight_map": {"x": 3}}):
        index.write_text(json.dumps(wrong))
        assert f"{index}: its weight_map is no object" in refused(source, capsys)
    index.unlink()
    assert same(model, read_model(source)[1]), "their names say what is whole"
    (source / names[2]).unlink()
    assert f"{source / names[2]}: no such file, and the others of its set are there" in refused(source, capsys)


STAND_INS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER.encode(), "is a git-lfs pointer to the file and not the file itself: run `git lfs pull` in its "
                "directory"),
    "annex": (b"/annex/objects/SHA256E-s165--4d7a21.bin\n", "is a git-annex pointer to the file"),
    "page": (b"<!DOCTYPE html>\n<html><head>", "is a web page and not the file itself"),
    "empty": (b"", "is empty, its download or copy has failed: fetch it again"),
}


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize(("format", "name"), [
    ("published", "weights.ckpt"), ("published", "config.json"), ("huggingface", WEIGHTS), ("safetensors", WEIGHTS),
    ("huggingface", "pytorch_model.bin")])
def test_what_stands_where_a_file_should_be(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, format: str,
                                            name: str) -> None:
    content, message = STAND_INS[kind]
    write_model(tmp_path / "source", format, *small())
    if name == "pytorch_model.bin":
        (tmp_path / "source" / WEIGHTS).unlink()
    (tmp_path / "source" / name).write_bytes(content)
    assert f"{tmp_path / 'source' / name}: {message}" in refused(tmp_path / "source", capsys)


@pytest.mark.parametrize("cut", [lambda size: 1, lambda size: size // 2, lambda size: size - 1])
@pytest.mark.parametrize(("format", "name"), [("published", "weights.ckpt"), ("huggingface", WEIGHTS)])
def test_a_file_that_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture, format: str, name: str,
                                  cut: Callable[[int], int]) -> None:
    write_model(tmp_path / "source", format, *small())
    content = (tmp_path / "source" / name).read_bytes()
    (tmp_path / "source" / name).write_bytes(content[: cut(len(content))])
    error = refused(tmp_path / "source", capsys)
    assert f"{tmp_path / 'source' / name}: no readable " in error
    assert "it is cut short or damaged" in error


def test_a_link_to_nowhere_is_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, state = published(tmp_path / "source")
    (tmp_path / "source" / WEIGHTS).symlink_to("nowhere")
    assert f"{tmp_path / 'source' / WEIGHTS}: cannot be read (No such file or directory)" in refused(
        tmp_path / "source", capsys)


def test_sizes_are_told_by_the_file_s_own_keys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_model(tmp_path / "source", "huggingface", *small())
    config = tmp_path / "source" / "config.json"
    good = json.loads(config.read_text())
    for key, value in (("n_layer", 3), ("d_model", 10**9), ("d_inner", 10**9), ("num_inner_mlps", 10**9)):
        config.write_text(json.dumps(good | {key: value}))
        assert f"source: {key} is {value}, " in refused(tmp_path / "source", capsys)


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
