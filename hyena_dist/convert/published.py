"""Published HyenaDNA checkpoints, to and from a HyenaModel.

`config` is the published config.json as a dict; `state_dict` has the published keys. Accepted on the way in: prefixes
of wrappers (`convert.weights`), `.layer` keys (models trained with the published checkpointing), a `lm_head.weight`
that is absent, the embedding, or a weight of its own, which makes an untied model, the one sine frequency stored three
times, stored or absent position buffers, torchmetrics' counters, and the head of another task, which is left out aloud.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hyena_dist.config.sections.model import VOCAB_MULTIPLE, ModelSection
from hyena_dist.convert.keys import check_keys
from hyena_dist.convert.section import ConversionError, checked_section, refuse_missing
from hyena_dist.convert.weights import (
    DERIVED,
    HEAD,
    TABLE,
    check_finite,
    refuse_head,
    refuse_kinds,
    refuse_kmers,
    same,
    unwrapped,
    without_memory,
)
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.implicit_filter import FilterShape, decay_rates, positional_features, time

POSITION_TOLERANCE = 1e-5
"""Relative, of positions and decay rates stored in float32; in half precision their rounding, if that is more. Other
machines' float32 is off by some 1e-7, a trained position soon by more than this."""

PUBLISHED_KEYS = {
    "num_layers": "n_layer", "hidden_size": "d_model", "ffn_hidden_size": "d_inner", "max_seq_len": "layer.l_max",
    "hyena_order": "layer.order", "filter_order": "layer.filter_order", "filter_emb_dim": "layer.emb_dim",
    "filter_sine_freq": "layer.w", "filter_num_inner_mlps": "layer.num_inner_mlps", "filter_shift": "layer.shift",
    "short_conv_kernel": "layer.short_filter_order"}
"""Keys of the `model` section to those of a published config.json, where it has others."""

logger = logging.getLogger(__name__)


def from_published(config: Mapping[str, Any], state_dict: Mapping[str, Tensor] | None,
                   names: Mapping[str, str] = PUBLISHED_KEYS) -> HyenaModel:
    """Build the model of a published configuration, in eval mode, on the CPU, in the weights' own dtype.

    Args:
        config: the published config.json. `layer.shift` (0.05 if absent, as in the published inference code) is the
            constant of the decay window, `layer.order` the order of the operator (2 if absent).
        state_dict: weights by published name, on any device; None: initial values in float32.
        names: as of `model_section`.

    Raises:
        ConversionError: an option of another function (`convert.keys`), a missing or unknown key, a shape that does
            not fit, weights that are no finite floating-point numbers, positions or decay rates that were trained.
    """
    section = model_section(config, names)
    if state_dict is None:
        return HyenaModel(hyena_config(section)).eval()
    state_dict = {key: value.cpu() for key, value in unwrapped(state_dict).items()}
    weights = _canonical(state_dict)
    section = replace(section, tie_embeddings=HEAD not in weights)
    if config.get("tie_word_embeddings") is True and not section.tie_embeddings:
        raise ConversionError(f"tie_word_embeddings is true in the config.json, and {HEAD} is another weight than the "
                              f"embedding: set it to false if the head was trained by itself, else remove {HEAD}")
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    model = without_memory(section, {key: weight.shape for key, weight in weights.items()}, dtype, names)
    published_names = _published_names(model)
    expected = {published for published, _ in published_names.values()}
    for key, kind in ((expected - weights.keys(), "lacks"), (weights.keys() - expected, "has the unknown")):
        if key:
            raise ConversionError(f"the state dict {kind} key {sorted(key)[0]} ({len(key)} in all): "
                                  "is it of a HyenaDNA model of this config?")
    for published, shape in published_names.values():
        if weights[published].shape != shape:
            raise ConversionError(f"{published} has shape {list(weights[published].shape)}, the config asks for "
                                  f"{list(shape)}: use the config.json that belongs to these weights")
    check_finite(weights)
    _check_derived(state_dict, model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[published_names[name][0]].reshape(parameter.shape))
    return model.eval()


def to_published(model: HyenaModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The published config and state dict of a model, position buffers and aliases included; the inverse of
    `from_published`, bit for bit. Tensors are copies on the CPU.

    Raises:
        ConversionError: the published code has no such mixers, or cannot run the model to its full length; its tokens
            are k-mers; or the positions up to it do not fit the memory.
    """
    c = model.config
    refuse_head(model)
    refuse_kmers(model)
    refuse_kinds(model, "published")
    if c.filter_seq_len < c.max_seq_len:
        raise ConversionError(f"model.filter_seq_len ({c.filter_seq_len}) is less than model.max_seq_len "
                              f"({c.max_seq_len}), and the published format has one number, l_max, for both: export "
                              "the model before its context was extended, or one extended by stretching its filter")
    positions = 4 * c.num_layers * c.filter_seq_len * (c.filter_emb_dim + 1)
    if positions > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ConversionError(f"the published format stores the positions of every layer up to model.max_seq_len="
                              f"{c.max_seq_len}, {positions / 2**30:.0f} GiB where this machine has "
                              f"{memory / 2**30:.0f}: keep this model as safetensors or a checkpoint")
    layer = {"_name_": "hyena", "emb_dim": c.filter_emb_dim, "filter_order": c.filter_order,
             "short_filter_order": c.short_conv_kernel, "l_max": c.filter_seq_len, "modulate": True,
             "w": c.filter_sine_freq, "lr_pos_emb": 0.0, "order": c.hyena_order,
             "num_inner_mlps": c.filter_num_inner_mlps, "shift": c.filter_shift}
    config = {"d_model": c.hidden_size, "n_layer": c.num_layers, "d_inner": c.ffn_hidden_size,
              "vocab_size": c.padded_vocab_size, "embed_dropout": c.embed_dropout, "resid_dropout": c.resid_dropout,
              "residual_in_fp32": True, "pad_vocab_size_multiple": VOCAB_MULTIPLE, "layer": layer}
    state: dict[str, Tensor] = {}
    names = _published_names(model)
    for name, parameter in model.named_parameters():
        published, shape = names[name]
        state[published] = parameter.detach().cpu().clone().reshape(shape)
    for i in range(c.num_layers):
        state |= _derived(f"backbone.layers.{i}.mixer.filter_fn.", state, c.filter_shape, c.filter_num_inner_mlps,
                          c.hidden_size * c.num_filters)
    state.setdefault(HEAD, state[TABLE])
    return config, state


def model_section(config: Mapping[str, Any], names: Mapping[str, str] = PUBLISHED_KEYS) -> ModelSection:
    """The `model` section of a published config.json.

    Args:
        names: what messages call the keys of the section.

    Raises:
        ConversionError: a missing key, or an option whose published meaning this model does not have.
    """
    layer = config.get("layer")
    if not isinstance(layer, Mapping):
        raise ConversionError("not a published HyenaDNA config.json: its key layer is no object")
    refuse_missing([*(key for key in ("d_model", "n_layer", "vocab_size") if key not in config),
                    *(["layer.l_max"] if "l_max" not in layer else [])])
    check_keys(config)
    width, inner_size = config["d_model"], config.get("d_inner")
    values = {
        "num_layers": config["n_layer"], "hidden_size": width, "max_seq_len": layer["l_max"],
        "ffn_hidden_size": None if isinstance(width, int) and inner_size == 4 * width else inner_size,
        "hyena_order": layer.get("order", 2), "filter_order": layer.get("filter_order", 64),
        "filter_emb_dim": layer.get("emb_dim", 3), "filter_sine_freq": layer.get("w", 1),
        "filter_num_inner_mlps": layer.get("num_inner_mlps", 2), "filter_shift": layer.get("shift", 0.05),
        "short_conv_kernel": layer.get("short_filter_order", layer.get("local_order", 3)),
        "vocab_size": config["vocab_size"], "embed_dropout": config.get("embed_dropout", 0.1),
        "resid_dropout": config.get("resid_dropout", 0.0)}
    if layer.get("short_filter_order", layer.get("local_order")) != layer.get("local_order", layer.get(
            "short_filter_order")):
        raise ConversionError("layer.short_filter_order and layer.local_order, two names of one number, differ: remove "
                              "one of them")
    return checked_section(values, names)


def _canonical(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys without aliases and buffers, and without a head that is the embedding."""
    weights: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        key = key.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")
        if key.endswith(DERIVED):
            continue
        if "implicit_filter." in key and key.endswith(".freq"):
            key = key[: key.rindex("implicit_filter.")] + "implicit_filter.1.freq"
        if key in weights and not same(value, weights[key]):
            raise ConversionError(f"two tensors of the state dict that are one weight of HyenaDNA differ: {key}")
        weights[key] = value
    if not weights:
        raise ConversionError("the state dict is empty")
    if HEAD in weights and TABLE in weights and same(weights[HEAD], weights[TABLE]):
        del weights[HEAD]
    return weights


def _check_derived(state_dict: Mapping[str, Tensor], model: HyenaModel) -> None:
    """Positions and decay rates, which this model computes: a file with others would be another model, silently."""
    config, channels = model.config, model.config.hidden_size * model.config.num_filters
    lags = config.filter_seq_len
    shapes = {"pos_emb.z": [1, lags, config.filter_emb_dim], "pos_emb.t": [1, lags, 1],
              "modulation.deltas": [1, 1, channels]}
    stored = {key: kind[1:] for key in state_dict for kind in DERIVED if key.endswith(kind)}
    for key, name in stored.items():
        if list(state_dict[key].shape) != shapes[name]:
            raise ConversionError(f"{key} has shape {list(state_dict[key].shape)}, the config asks for {shapes[name]}: "
                                  "use the config.json that belongs to these weights")
        check_finite({key: state_dict[key]})
    derived = {name: _derived_values(name, config.filter_shape, channels, torch.float32)
               for name in set(stored.values())}
    for key, name in stored.items():
        saved, wanted = state_dict[key], derived[name]
        tolerance = max(POSITION_TOLERANCE, torch.finfo(saved.dtype).eps)
        difference = ((saved.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)).max().item()
        if not difference <= tolerance:
            raise ConversionError(f"{key} differs from the published values by {difference:.1e} (tolerance "
                                  f"{tolerance:.0e} in {str(saved.dtype).removeprefix('torch.')}): it was trained or "
                                  "made by other constants, and this model has no such weights")
    if not any(name.startswith("pos_emb.") for name in stored.values()):
        logger.warning("l_max=%d of the config.json cannot be verified: the file has weights without positions",
                       lags)


def _published_names(model: HyenaModel) -> dict[str, tuple[str, torch.Size]]:
    """Our parameter name -> (published key, published shape)."""
    names = {}
    for name, parameter in model.named_parameters():
        key, shape = HEAD if name == "head.weight" else "backbone." + name, parameter.shape
        for ours, theirs in (("embedding.word", "embeddings.word"), ("input_norm", "norm1"), ("mlp_norm", "norm2"),
                             ("final_norm", "ln_f"), ("short_conv", "short_filter"), ("conv_bias", "filter_fn.bias")):
            key = key.replace(ours, theirs)
        if ".filter." in key:
            prefix, leaf = key.split(".filter.")
            key = f"{prefix}.filter_fn.implicit_filter.{_published_filter_leaf(leaf, model)}"
        if name.endswith(".short_conv.weight"):
            shape = torch.Size((shape[0], 1, shape[1]))
        elif name.endswith(".filter.freq"):
            shape = torch.Size((1, *shape))
        names[name] = (key, shape)
    return names


def _published_filter_leaf(leaf: str, model: HyenaModel) -> str:
    if leaf == "freq":
        return "1.freq"
    if leaf == "last_weight":
        return f"{2 * (model.config.filter_num_inner_mlps + 1)}.weight"
    _, kind, index = leaf.split("_")
    return f"{2 * int(index)}.{kind}"


def _derived(prefix: str, state: Mapping[str, Tensor], shape: FilterShape, inner_mlps: int,
             channels: int) -> dict[str, Tensor]:
    """What a published state dict stores besides weights: aliases of the frequency, positions, decay rates."""
    freq = state[prefix + "implicit_filter.1.freq"]
    return {
        **{f"{prefix}implicit_filter.{2 * i + 1}.freq": freq for i in range(1, inner_mlps + 1)},
        **{prefix + kind[1:]: _derived_values(kind[1:], shape, channels, freq.dtype).clone() for kind in DERIVED},
    }


def _derived_values(name: str, shape: FilterShape, channels: int, dtype: torch.dtype) -> Tensor:
    """pos_emb.z [1, lags, features], pos_emb.t [1, lags, 1] or modulation.deltas [1, 1, channels]."""
    device, every_lag = torch.device("cpu"), slice(0, shape.seq_len)
    if name == "modulation.deltas":
        return decay_rates(channels, dtype, device)[None, None]
    if name == "pos_emb.t":
        return time(shape, every_lag, dtype, device)[None, :, None]
    return positional_features(shape, every_lag, dtype, device)[None]
