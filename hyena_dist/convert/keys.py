"""The keys of a published config.json: which are honoured, which have one value here, and which change nothing.

The published classes swallow keys that they do not know, so that a misspelt one is a silent other model. Here a key
that is in no list is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from hyena_dist.config.sections.model import VOCAB_MULTIPLE
from hyena_dist.convert.section import ConversionError

HONOURED = frozenset({"d_model", "n_layer", "d_inner", "vocab_size", "embed_dropout", "resid_dropout", "layer"})
LAYER_HONOURED = frozenset({"l_max", "order", "filter_order", "emb_dim", "w", "num_inner_mlps", "shift",
                            "short_filter_order", "local_order"})

ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "norm_epsilon": (1e-5,), "layer_norm_epsilon": (1e-5,), "pad_vocab_size_multiple": (VOCAB_MULTIPLE,),
    "attn_layer_idx": (None, []), "max_position_embeddings": (0,), "identity_mlp": (False,), "drop_path": (0,),
    "use_head": (False,), "use_bias": (True,), "hyena_dropout": (0,),
}
LAYER_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "_name_": ("hyena",), "filter_cls": ("hyena-filter",), "activation": ("id", "identity", "linear", None),
    "modulate": (True,), "fast_decay_pct": (0.3,), "slow_decay_pct": (1.5,), "target": (1e-2,),
    "bidirectional": (False,), "normalized": (False,), "linear_mixer": (False,), "outer_mixing": (False,),
    "post_order_ffn": (False,), "return_state": (False,), "bias": (True,), "dropout": (0,),
    "num_heads": (1,), "num_blocks": (1,), "inner_factor": (1,),
}

_OF_TRANSFORMERS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_auto_class",
    "_commit_hash", "_name_or_path", "add_cross_attention", "architectures", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
    "cross_attention_hidden_size", "custom_pipelines", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "mask_token_id", "max_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "unk_token_id", "use_bfloat16", "use_cache", "xla_device",
})
"""What transformers' own PretrainedConfig writes for every model: how text is generated, labels of a classifier, forms
of attention. Not quantization_config, by which the weights mean something else."""
HARMLESS = frozenset({
    "_name_", "fused_mlp", "fused_dropout_add_ln", "residual_in_fp32", "checkpoint_mixer", "checkpoint_mlp",
    "process_group", "sequence_parallel", "device", "dtype", "initializer_cfg", "return_hidden_state",
    "return_residual", "n_classes", "dropout_cls", "attn_cfg",
    "initializer_range", "train_freq", "hyena_filter_dropout",  # of Hugging Face's port
}) | _OF_TRANSFORMERS
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
