"""The keys of a published config.json: which are honoured, which have one value here, and which change nothing.

The published classes swallow keys that they do not know, so that a misspelt one is a silent other model. Here a key
that is in no list is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from hyena_dist.config.schema import VOCAB_MULTIPLE
from hyena_dist.convert.section import ConversionError

HONOURED = frozenset({"d_model", "n_layer", "d_inner", "vocab_size", "embed_dropout", "resid_dropout", "layer"})
LAYER_HONOURED = frozenset({"l_max", "order", "filter_order", "emb_dim", "w", "num_inner_mlps", "shift",
                            "short_filter_order", "local_order"})

ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "norm_epsilon": (1e-5,), "layer_norm_epsilon": (1e-5,), "pad_vocab_size_multiple": (VOCAB_MULTIPLE,),
    "attn_layer_idx": (None, []), "max_position_embeddings": (0,), "identity_mlp": (False,), "drop_path": (0,),
    "use_head": (False,), "use_bias": (True,),
}
LAYER_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "_name_": ("hyena",), "filter_cls": ("hyena-filter",), "activation": ("id", "identity", "linear", None),
    "modulate": (True,), "fast_decay_pct": (0.3,), "slow_decay_pct": (1.5,), "target": (1e-2,),
    "bidirectional": (False,), "normalized": (False,), "linear_mixer": (False,), "outer_mixing": (False,),
    "post_order_ffn": (False,), "return_state": (False,), "bias": (True,), "dropout": (0,),
    "num_heads": (1,), "num_blocks": (1,), "inner_factor": (1,),
}

HARMLESS = frozenset({
    "_name_", "fused_mlp", "fused_dropout_add_ln", "residual_in_fp32", "checkpoint_mixer", "checkpoint_mlp",
    "process_group", "sequence_parallel", "device", "dtype", "initializer_cfg", "return_hidden_state",
    "return_residual", "n_classes", "dropout_cls", "attn_cfg",
    # Of Hugging Face's port, and of its library.
    "initializer_range", "train_freq", "hyena_filter_dropout", "tie_word_embeddings", "architectures", "auto_map",
    "model_type", "torch_dtype", "transformers_version", "_name_or_path", "pad_token_id", "bos_token_id",
    "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels", "problem_type",
})
"""Speed, memory, training, and the form of the output: the function is the same at any value. attn_cfg says how
attention layers look, attn_layer_idx whether there are any. A head that is not tied differs in its weights."""
LAYER_HARMLESS = frozenset({"lr", "wd", "lr_pos_emb", "modulation_lr", "filter_dropout", "fused_fft_conv",
                            "fused_bias_fc", "jit_filter", "checkpoint_mixer", "checkpoint_mlp"})
"""filter_dropout was never used. What a learning rate made of positions or decay rates is seen in their values."""


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a published configuration with a key that would make another function of the same weights.

    Raises:
        ConversionError: naming each such key, or one that is not known.
    """
    _check(config, "", HONOURED | HARMLESS, ONE_VALUE)
    _check(config["layer"], "layer.", LAYER_HONOURED | LAYER_HARMLESS, LAYER_ONE_VALUE)


def _check(section: Mapping[str, Any], prefix: str, free: frozenset[str],
           one_value: Mapping[str, tuple[Any, ...]]) -> None:
    other = {f"{prefix}{key}": value for key, value in section.items()
             if key in one_value and not any(_same(value, allowed) for allowed in one_value[key])}
    if other:
        allowed = ", ".join(f"{key}: {one_value[key.removeprefix(prefix)][0]!r}" for key in other)
        raise ConversionError(f"unsupported published options: {other}; this model has {allowed}")
    if unknown := sorted(f"{prefix}{key}" for key in section.keys() - free - one_value.keys()):
        raise ConversionError(f"the config.json has keys that are not known and may change the model: "
                              f"{', '.join(unknown)}: remove them if they do not")


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and no bool for a number: True is 1 in Python."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
