"""Hugging Face's port of HyenaDNA (LongSafari/hyenadna-*-hf), to and from the published layout.

Its config.json is flat. Its keys have the prefix `hyena.`, the sine frequency is stored once, and of a tied model the
head is a copy of the embedding. Its code fixes the filter's shift; order and kernel are keys that work at one value
only.

What is written here has the same layout, and code of its own beside it (`convert.modeling_hyena_dist`), which has any
shift, order and kernel. Its config.json has the key filter_shift, which the port's does not know.
"""

import json
import logging
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from torch import Tensor

from hyena_dist.convert.published import PUBLISHED_KEYS
from hyena_dist.convert.section import ConversionError, refuse_missing
from hyena_dist.convert.weights import HEAD, TABLE, same, unwrapped
from hyena_dist.data.tokenizer import PAD, A, T

_SHIFT = 0.05
_CODE = "modeling_hyena_dist"
_CLASSES = {"AutoConfig": "HyenaDNAConfig", "AutoModel": "HyenaDNAModel",
            "AutoModelForCausalLM": "HyenaDNAForCausalLM",
            "AutoModelForSequenceClassification": "HyenaDNAForSequenceClassification"}
"""Where transformers finds the classes (trust_remote_code=True)."""
_OWN = "filter_shift"
"""The key by which what is written here is known."""
_KEYS = ("d_model", "d_inner", "n_layer", "vocab_size", "embed_dropout", "resid_dropout", "pad_vocab_size_multiple")
"""Named as in a published config.json."""
_LAYER_KEYS = {"max_seq_len": "l_max", "emb_dim": "emb_dim", "filter_order": "filter_order", "hyena_order": "order",
               "short_filter_order": "short_filter_order", "activation_freq": "w", "num_inner_mlps": "num_inner_mlps",
               _OWN: "shift"}
"""Their keys to those of the section `layer` of a published config.json."""
HUGGINGFACE_KEYS = PUBLISHED_KEYS | {own: theirs for own, published in PUBLISHED_KEYS.items()
                                     for theirs, key in _LAYER_KEYS.items() if published == f"layer.{key}"}
"""Keys of the `model` section to those of their config.json."""

_TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": PAD}
"""As the tokenizer has them (`convert.tokenizer`)."""

logger = logging.getLogger(__name__)

Model = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json, state dict."""


def to_huggingface(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Model:
    """The port's layout of a published configuration and state dict, as `to_published` returns them."""
    layer = config["layer"]
    ported = {"architectures": ["HyenaDNAForCausalLM"],
              "auto_map": {kind: f"{_CODE}.{name}" for kind, name in _CLASSES.items()},
              "model_type": "hyenadna", "torch_dtype": "float32", "use_cache": False,
              "tie_word_embeddings": same(state_dict[HEAD], state_dict[TABLE]), **_TOKENS,
              "use_bias": True, "train_freq": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
              "hyena_dropout": 0.0, "hyena_filter_dropout": 0.0,
              **{key: config[key] for key in _KEYS if key in config},
              **{key: layer[theirs] for key, theirs in _LAYER_KEYS.items() if theirs in layer}}
    weights = {key if key == HEAD else f"hyena.{key}": value.clone() for key, value in state_dict.items()
               if not key.endswith(".freq") or key.endswith(".1.freq")}
    return ported, weights


def code_files(padded_vocab_size: int) -> dict[str, bytes]:
    """Contents by name: the classes that config.json names, and how `generate` makes sequence: of A, C, G and T alone.
    """
    bases = range(A, T + 1)
    generation = {**_TOKENS, "use_cache": False,
                  "suppress_tokens": [token for token in range(padded_vocab_size) if token not in bases]}
    return {f"{_CODE}.py": files("hyena_dist.convert").joinpath(f"{_CODE}.py").read_bytes(),
            "generation_config.json": (json.dumps(generation, indent=1) + "\n").encode()}


def from_huggingface(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Model:
    """The inverse of `to_huggingface`. What is unknown, `from_published` refuses.

    Raises:
        ConversionError: a missing key, or an order or a kernel with which the port's code does not work.
    """
    published: dict[str, Any] = {"vocab_size": 12}
    # What is no key of its own stays as it is: `from_published` knows what it may be.
    published |= {key: value for key, value in config.items() if key not in _LAYER_KEYS and value is not None}
    refuse_missing(key for key in ("d_model", "n_layer", "max_seq_len") if config.get(key) is None)
    published["layer"] = {"shift": _SHIFT} | {theirs: config[key] for key, theirs in _LAYER_KEYS.items()
                                              if config.get(key) is not None}
    if config.get(_OWN) is None:
        _check_working(published["layer"])
    weights = unwrapped(state_dict)
    if HEAD not in weights and config.get("tie_word_embeddings") is not True:
        logger.warning("the file has no %s: the embedding is taken for it, and the two are tied", HEAD)
    return published, weights


def _check_working(layer: Mapping[str, Any]) -> None:
    for theirs, value in (("short_filter_order", 3), ("hyena_order", 2)):
        found = layer.get(_LAYER_KEYS[theirs], value)
        if found != value:
            raise ConversionError(f"{theirs} is {found!r}, Hugging Face's code works with {value} only")
