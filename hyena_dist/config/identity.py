"""What a resume may change: every key of a run is in exactly one of three classes.

A new key of `config/sections/` belongs into one of them; a test fails until it does.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import BEFORE_THE_KEY
from hyena_dist.config.warmup import warmup_entries

FIXED = frozenset({
    # The architecture: other weights, or another function of the same ones.
    *(f"model.{key}" for key in (
        "num_layers", "hidden_size", "ffn_hidden_size", "max_seq_len", "hyena_order", "filter_order", "filter_emb_dim",
        "filter_sine_freq", "filter_num_inner_mlps", "filter_shift", "filter_seq_len", "short_conv_kernel",
        "vocab_size", "num_attention_heads", "layer_pattern", "tie_embeddings", "kmer",
        "kmer_overlap")),
    # Which windows come, and in which order: the place in the data is a number of windows of this length and batch.
    "data.seq_len", "data.pack", "data.rc_augment", "data.seed", "train.global_batch_size",
    "data.mixture", "data.mixture_temperature", "data.mixture_schedule",
    "train.seq_len_warmup", "train.seq_len_warmup_steps", "train.seq_len_warmup_batch",
    # The initial weights, which are history.
    "train.seed",
    # What is learnt of labelled sequences.
    *(f"finetune.{key}" for key in (
        "sequence_column", "label_column", "split_column", "valid_fraction", "valid_chromosomes", "test_chromosomes",
        "task", "pooling", "bin_size", "bins_cut", "diagonals", "loss", "trained", "lora_rank", "lora_alpha",
        "lora_targets", "prompt_tokens", "shots", "longer", "rc")),
})
"""A resume may not change them."""

CHANGEABLE = frozenset({
    # How training goes on. Weights, Adam's moments and the place in the data mean the same under any of these.
    "train.steps", "train.max_hours", "train.on_nonfinite", "model.embed_dropout", "model.resid_dropout",
    *(f"optim.{key}" for key in ("lr", "schedule", "cooldown", "min_lr", "warmup_steps", "weight_decay", "betas", "eps",
                                 "grad_clip")),
    # What is measured, and when it is measured and saved.
    "data.val_seq_len", "data.val_tokens", "train.eval_every", "train.save_every", "train.keep_last",
    "train.keep_every", "train.profile_steps", "train.wandb", "train.patience", "finetune.epochs", "finetune.seeds",
    "finetune.lr_decay", "finetune.baselines",
    # On what it runs. A checkpoint does not depend on it; its weights are float32 at any precision.
    "train.precision", "train.micro_batch_size", "train.activation_checkpointing", "train.activation_offload",
    "data.lower_case_weight", "data.num_workers", "ops.backend",
    *(f"parallel.{key}" for key in ("tensor", "context", "sequence", "context_method", "overlap_groups")),
    *(f"engine.{key}" for key in ("name", "zero_stage", "offload", "deepspeed")),
})
"""A resume may change them; it says so, with the old and the new value."""

PLACES = frozenset({"train.run_dir", "train.resume", "data.shards", "data.cache", "data.cache_gb",
                    *(f"finetune.{key}" for key in ("from_", "table", "valid", "test", "genome", "homology"))})
"""Where things lie, which no checkpoint keeps. Shards and labelled sequences are compared by their content, not by
their path."""

MEASURE = ("data.val_seq_len", "data.val_tokens")
"""Keys that decide over what a validation loss is taken: losses under different values are not compared."""


def identity(config: Config) -> dict[str, Any]:
    """Every key but PLACES as {"section.key": value}, plain JSON: what a checkpoint keeps of its run."""
    kept = {f"{section}.{key}": value for section, keys in asdict(config).items() for key, value in keys.items()
            if f"{section}.{key}" not in PLACES}
    # The stages as they are meant. Their micro-batches are as changeable as train.micro_batch_size; null is no value.
    kept["train.seq_len_warmup"] = [{key: value for key, value in asdict(stage).items()
                                     if key != "micro_batch_size" and value is not None}
                                    for stage in warmup_entries(config)]
    # Where the sources of a mixture lie may change; what is in them is compared by the stream of windows.
    if config.data.mixture is not None:
        kept["data.mixture"] = [{"name": source.name, "weight": source.weight} for source in config.data.sources()]
    kept = json.loads(json.dumps(kept))
    assert isinstance(kept, dict)
    return kept


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One phrase per FIXED key that differs."""
    younger = {**{f"model.{key}": value for key, value in BEFORE_THE_KEY.items()}, "data.pack": False,
               **{f"finetune.{key}": value for key, value in asdict(FinetuneSection()).items()}}
    saved, current = younger | dict(saved), younger | dict(current)
    return [f"{key}: saved {json.dumps(saved.get(key))}, now {json.dumps(current.get(key))}"
            for key in sorted(FIXED & (saved.keys() | current.keys())) if saved.get(key) != current.get(key)]


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The old and the new value of each CHANGEABLE key that both know and that differs."""
    return {key: (saved[key], current[key])
            for key in sorted(CHANGEABLE & saved.keys() & current.keys()) if saved[key] != current[key]}


def measured_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the validation losses of two identities can be compared."""
    return all(one.get(key) == other.get(key) for key in MEASURE)
