"""What would make another function of a published model's weights is refused by name, each key with a control."""

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.cli.convert import main
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import FORMATS, ConversionError, from_published, load_lightning, read_model, write_model
from hyena_dist.convert.keys import HARMLESS, LAYER_HARMLESS
from tests.checkpoints import edit_metadata, put_in
from tests.compare import rel
from tests.unit.test_convert_directory import golden, published_directory, small

IDS = torch.randint(7, 11, (2, 100), generator=torch.Generator().manual_seed(0))
FILTER = "backbone.layers.1.mixer.filter_fn."


def published() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, weights, _ = golden("tiny")
    return config, {key: value.float().clone() for key, value in weights.items()}


TOP = {"layer_norm_epsilon": (1e-3, 1e-5), "norm_epsilon": (1e-6, 1e-5), "pad_vocab_size_multiple": (16, 8),
       "attn_layer_idx": ([0], None), "max_position_embeddings": (512, 0), "identity_mlp": (True, False),
       "drop_path": (0.1, 0.0), "hyena_dropout": (0.1, 0.0), "use_head": (True, False), "use_bias": (False, True)}
LAYER = {"_name_": ("s4d", "hyena"), "filter_cls": ("mlp", "hyena-filter"), "activation": ("gelu", "id"),
         "modulate": (False, True), "fast_decay_pct": (0.5, 0.3), "slow_decay_pct": (1.0, 1.5), "target": (1e-3, 0.01),
         "bidirectional": (True, False), "normalized": (True, False), "linear_mixer": (True, False),
         "outer_mixing": (True, False), "post_order_ffn": (True, False), "return_state": (True, False),
         "bias": (False, True), "dropout": (0.1, 0.0), "num_heads": (2, 1), "num_blocks": (2, 1),
         "inner_factor": (2, 1)}
UNKNOWN = ("fast_decay", "filter_type", "Order", "rms_norm", "rotary")


@pytest.mark.parametrize(("prefix", "key", "other", "same"), [
    *(("", key, *values) for key, values in TOP.items()), *(("layer.", key, *values) for key, values in LAYER.items())])
def test_an_option_of_another_function_is_refused_by_name(prefix: str, key: str, other: Any, same: Any) -> None:
    config, weights = published()
    expected = from_published(config, weights)(IDS)
    section = config["layer"] if prefix else config
    section[key] = same
    assert torch.equal(from_published(config, weights)(IDS), expected), "control: the value that this model has"
    for value in (other, "x", [1]):
        section[key] = value
        with pytest.raises(ConversionError, match=rf"unsupported published options: .*'{prefix}{key}'"):
            from_published(config, weights)


@pytest.mark.parametrize("prefix", ["", "layer."])
@pytest.mark.parametrize("key", UNKNOWN)
def test_a_key_that_is_not_known_is_refused_by_name(prefix: str, key: str) -> None:
    config, weights = published()
    (config["layer"] if prefix else config)[key] = 1
    with pytest.raises(ConversionError, match=rf"keys that are not known and may change the model: {prefix}{key}"):
        from_published(config, weights)


def test_keys_that_change_nothing() -> None:
    config, weights = published()
    expected = from_published(config, weights)(IDS)
    for section, keys in ((config, HARMLESS), (config["layer"], LAYER_HARMLESS)):
        section.update(dict.fromkeys(keys - {"_name_"}, 0.123))
    assert torch.equal(from_published(config, weights)(IDS), expected)
    config["layer"] |= {"short_filter_order": 3, "local_order": 5}
    with pytest.raises(ConversionError, match="short_filter_order and layer.local_order"):
        from_published(config, weights)


def test_hugging_face_s_keys_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_model(tmp_path / "hf", "huggingface", *small())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value in (("layer_norm_epsilon", 1e-3), ("use_bias", False), ("rope_theta", 1.0), ("hyena_dropout", 0.2)):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        assert main([str(tmp_path / "hf"), str(tmp_path / "dest")]) == 2
        assert re.search(rf"[ '{{]{key}\b", capsys.readouterr().err)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"transformers_version": "4.26.1"}))
    assert main([str(tmp_path / "hf"), str(tmp_path / "dest")]) == 0, "control"


def test_the_keys_of_every_model_of_transformers_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As PretrainedConfig.to_dict gives them, of one release and another."""
    section, model = small()
    write_model(tmp_path / "hf", "huggingface", section, model)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {
        "_attn_implementation_autoset": True, "_commit_hash": None, "add_cross_attention": False, "bad_words_ids": None,
        "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "do_sample": False, "is_decoder": False,
        "dtype": "float32", "early_stopping": False, "max_length": 20, "num_beams": 1, "pruned_heads": {}, "top_k": 50,
        "tokenizer_class": None, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False}))
    _, found, _ = read_model(tmp_path / "hf")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())
    path.write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert main([str(tmp_path / "hf"), str(tmp_path / "dest")]) == 2
    assert "quantization_config" in capsys.readouterr().err, "control: it says what the weights are"


# What the file stores besides weights


def scaled(name: str, by: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[FILTER + name] *= by
    return change


@pytest.mark.parametrize("name", ["modulation.deltas", "pos_emb.t", "pos_emb.z"])
def test_positions_and_decay_rates_of_other_values_are_refused(name: str) -> None:
    config, weights = published()
    assert FILTER + name in weights
    from_published(config, weights)
    plain = BaselineHyenaDNA(config, seed=1)
    weights["lm_head.weight"] = weights["backbone.embeddings.word_embeddings.weight"]
    plain.load_state_dict(weights)
    good = plain(IDS)
    scaled(name, 1.5)(weights)
    plain.load_state_dict(weights)
    change = rel(plain(IDS), good)
    print(f"{name} times 1.5: the published model's logits change by {change:.1%}; here the file is refused")
    assert change > 1e-3, "control: it is another function"
    with pytest.raises(ConversionError, match=f"{name} differs from the published values by"):
        from_published(config, weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5),
                                                  (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_tolerance_is_that_of_the_file_s_own_type(dtype: torch.dtype, tolerance: float) -> None:
    config, weights = published()
    for key in list(weights):
        if ".pos_emb." in key or ".deltas" in key:
            weights[key] = weights[key].to(dtype)
    from_published(config, weights)
    weights[FILTER + "pos_emb.z"][0, 5, 1] -= 4 * tolerance
    with pytest.raises(ConversionError, match=r"pos_emb.z differs from the published values by .* \(tolerance"):
        from_published(config, weights)
    weights[FILTER + "pos_emb.z"] = weights[FILTER + "pos_emb.z"].nan_to_num() * float("nan")
    with pytest.raises(ConversionError, match="holds NaN or infinity"):
        from_published(config, weights)


def test_it_is_said_where_l_max_cannot_be_verified(caplog: pytest.LogCaptureFixture) -> None:
    config, weights = published()
    from_published(config, weights)
    assert not caplog.records
    bare = {key: value for key, value in weights.items() if "pos_emb" not in key}
    config["layer"]["l_max"] = 260
    with pytest.raises(ConversionError, match=r"pos_emb.z has shape \[1, 130, 3\], the config asks for \[1, 260, 3"):
        from_published(config, weights)
    from_published(config, bare)
    assert [record.getMessage() for record in caplog.records] == [
        "l_max=260 of the config.json cannot be verified: the file has weights without positions"]


# Weights


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64,
                                   torch.float8_e4m3fn])
@pytest.mark.parametrize("format", ["published", "huggingface", "safetensors"])
def test_a_weight_that_is_no_floating_point_number(tmp_path: Path, capsys: pytest.CaptureFixture, format: str,
                                                   dtype: torch.dtype) -> None:
    if format == "published":
        config, weights = published()
        weights["backbone.layers.0.mixer.in_proj.weight"] = weights["backbone.layers.0.mixer.in_proj.weight"].to(dtype)
        with pytest.raises(ConversionError, match="in_proj.weight is a tensor of .*convert them back first"):
            from_published(config, weights)
        return
    write_model(tmp_path / "source", format, *small())
    state = load_file(tmp_path / "source" / "model.safetensors")
    key = next(key for key in state if key.endswith("layers.0.mixer.in_proj.weight"))
    save_file(state | {key: state[key].to(dtype)}, tmp_path / "source" / "model.safetensors")
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "in_proj.weight is a tensor of" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", ["published", "huggingface", "safetensors", "checkpoint"])
def test_a_weight_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture, format: str, value: float) -> None:
    section, model = small()
    with torch.no_grad():
        model.layers[1].mlp.fc1.weight[3, 2] = value
    write_model(tmp_path / "source", format, section, model)
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    assert "fc1.weight holds NaN or infinity (1 of 256 numbers)" in capsys.readouterr().err
    with torch.no_grad():
        model.layers[1].mlp.fc1.weight[3, 2] = 0.0
    write_model(tmp_path / "good", format, section, model)
    assert main([str(tmp_path / "good"), str(tmp_path / "dest")]) == 0, "control"


def test_a_sparse_weight() -> None:
    config, weights = published()
    weights["backbone.ln_f.weight"] = weights["backbone.ln_f.weight"].to_sparse()
    with pytest.raises(ConversionError, match=r"ln_f.weight is a tensor of float32, sparse"):
        from_published(config, weights)


NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
SHORT_FILTER, HEAD = "backbone.layers.0.mixer.short_filter.weight", "lm_head.weight"


@pytest.mark.parametrize("key", [SHORT_FILTER, HEAD, FILTER + "pos_emb.z", FILTER + "implicit_filter.3.freq"])
@pytest.mark.parametrize(("change", "message"), [
    (lambda value: value.to("meta"), "is a tensor of float32, without numbers: .* convert them back first"),
    (lambda value: value.to_sparse(), "is a tensor of float32, sparse: "),
    (lambda value: value.flatten(1).to_sparse_csr() if value.dim() > 1 else value, "is a tensor of float32, sparse: "),
    (lambda _: NESTED, "is a tensor of float32, nested: "),
    (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is a tensor of qint8: "),
    (lambda value: value.int(), "is a tensor of int32: "),
    (lambda _: torch.zeros(1).expand(10**11), r"has shape \[100000000000\] and 1 numbers in the file"),
    (lambda _: torch.zeros(1).half().expand(10**11), r"has shape \[100000000000\] and 1 numbers in the file"),
])
@pytest.mark.filterwarnings("ignore:.*[Ss]parse", "ignore:.*nested", "ignore:.*quantiz")
def test_the_form_of_every_tensor_comes_before_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture, key: str,
                                                           change: Callable[[torch.Tensor], torch.Tensor],
                                                           message: str) -> None:
    """Of weights, of aliases and of what is only compared; most operators fail on such tensors, or make all the numbers
    that they claim to have."""
    config, weights = published()
    weights[HEAD] = weights["backbone.embeddings.word_embeddings.weight"]
    from_published(config, weights)
    weights[key] = change(weights[key])
    with pytest.raises(ConversionError, match=f"{key} {message}"):
        from_published(config, weights)
    write_model(tmp_path / "hf", "huggingface", *small())
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert main([str(tmp_path / "hf"), str(tmp_path / "control")]) == 0
    theirs = key if key == HEAD else f"hyena.{key}".replace("implicit_filter.3", "implicit_filter.1")
    torch.save(state | {theirs: change(state[theirs])}, tmp_path / "hf" / "pytorch_model.bin")
    assert main([str(tmp_path / "hf"), str(tmp_path / "dest")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message.replace(" .* convert them back first", ""), error)


@pytest.mark.parametrize("length", [10**12, 10**19])
def test_positions_that_no_memory_holds_are_not_made(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                     length: int) -> None:
    """No weight depends on the length, so a file without positions may have any."""
    write_model(tmp_path / "source", "published", *small())
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    state = torch.load(tmp_path / "source" / "weights.ckpt")["state_dict"]
    bare = {key: value for key, value in state.items() if "pos_emb" not in key}
    torch.save({"state_dict": bare}, tmp_path / "source" / "weights.ckpt")
    path.write_text(json.dumps(config | {"layer": config["layer"] | {"l_max": length}}))
    for format in FORMATS:
        status = main([str(tmp_path / "source"), str(tmp_path / format), "--to", format])
        error = capsys.readouterr().err
        assert status == (0 if length < 2**53 and format in ("safetensors", "checkpoint") else 2)
        assert error.count("\n") == (status == 2)
        assert str(length) in error or status == 0


def test_an_index_that_claims_more_numbers_than_its_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_model(tmp_path / "source", "checkpoint", *small())
    index = pickle.loads((tmp_path / "source" / ".metadata").read_bytes())
    shape = torch.Size([10**7, 10**5])
    for kind in ("model", "optim/exp_avg"):
        index.state_dict_metadata[f"{kind}/embedding.word_embeddings.weight"].size = shape
        index.state_dict_metadata[f"{kind}/embedding.word_embeddings.weight"].chunks[0].sizes = shape
    put_in(tmp_path / "source", ".metadata", pickle.dumps(index))
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    assert re.search(r"its tensors have \d+ numbers, more than its files hold", capsys.readouterr().err)


@pytest.mark.parametrize(("key", "published_key"), [
    ("num_layers", "n_layer"), ("hidden_size", "d_model"), ("filter_num_inner_mlps", "num_inner_mlps"),
    ("hyena_order", "order"), ("filter_order", "filter_order"), ("filter_emb_dim", "emb_dim"),
    ("short_conv_kernel", "short_filter_order"), ("vocab_size", "vocab_size"), ("ffn_hidden_size", "d_inner"),
    ("max_seq_len", "l_max")])
@pytest.mark.parametrize("format", ["published", "safetensors", "checkpoint"])
def test_a_size_that_the_file_does_not_have_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture, format: str,
                                                         key: str, published_key: str) -> None:
    """A model of 10^9 layers or channels would take all memory, or for ever."""
    write_model(tmp_path / "source", format, *small())
    huge = 10**9 + 1
    if format == "checkpoint":
        metadata = json.loads((tmp_path / "source" / "metadata.json").read_text())
        edit_metadata(tmp_path / "source", identity=metadata["identity"] | {f"model.{key}": huge})
    else:
        path = tmp_path / "source" / "config.json"
        config = json.loads(path.read_text())
        of_layer = published_key in config.get("layer", {})
        section = config["layer"] if of_layer else config.get("model", config)
        section[key if format == "safetensors" else published_key] = huge
        path.write_text(json.dumps(config))
    status = main([str(tmp_path / "source"), str(tmp_path / "dest")])
    error = capsys.readouterr().err
    if key == "max_seq_len" and format != "published":  # no weight depends on it
        assert status == 0
    else:
        assert status == 2
        assert error.count("\n") == 1
        assert str(huge) in error
        assert key == "max_seq_len" or f"{published_key if format == 'published' else key} is {huge}, " in error


# Files


def test_a_record_of_torch_s_archive_that_has_changed(tmp_path: Path) -> None:
    source = published_directory(tmp_path / "source")
    with zipfile.ZipFile(source / "weights.ckpt") as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray((source / "weights.ckpt").read_bytes())
    content[info.header_offset + 200 + info.file_size // 2] ^= 1
    (source / "weights.ckpt").write_bytes(content)
    assert torch.load(source / "weights.ckpt", weights_only=True), "control: torch does not look"
    with pytest.raises(ConversionError, match=r"is damaged \(CRC-32\)"):
        load_lightning(source / "weights.ckpt")


@pytest.mark.parametrize(("format", "name"), [
    ("published", "config.json"), ("published", "weights.ckpt"), ("huggingface", "model.safetensors"),
    ("huggingface", "pytorch_model.bin"), ("safetensors", "model.safetensors"), ("safetensors", "config.json")])
def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture, format: str, name: str) -> None:
    write_model(tmp_path / "source", format, *small())
    if name == "pytorch_model.bin":
        (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "source" / name)
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error or name == "config.json"


def test_a_stranger_s_file_shows_nothing_of_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    write_model(tmp_path / "source", "safetensors", *small())
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    for value in ("${oc.env:SECRET}", "x${oc.env:SECRET}", "${.num_layers}"):
        path.write_text(json.dumps(config | {"model": config["model"] | {"layer_pattern": value}}))
        assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
        error = capsys.readouterr().err
        assert "layer_pattern: " in error
        assert "is not replaced in a configuration" in error
        assert "hunter2" not in error
    path.write_text(json.dumps(config | {"model": config["model"] | {"num_layers": True}}))
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
    assert "num_layers is True" in capsys.readouterr().err
    path.write_text(json.dumps(config))
    section, *_ = read_model(tmp_path / "source")
    assert isinstance(section, ModelSection), "control"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
