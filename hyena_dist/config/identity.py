"""What makes two configurations the same run: everything but topology, cadence and places on disk."""

from dataclasses import asdict
from typing import Any

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import BEFORE_THE_KEY
from hyena_dist.config.warmup import warmup_entries

FREE_KEYS = frozenset({
    # Topology and its engine: a checkpoint does not depend on them. Its weights are float32 at any precision.
    "train.micro_batch_size", "train.activation_checkpointing", "train.activation_offload", "train.precision",
    "data.num_workers",
    # Cadence and places. The shards are compared by their content, not by their path.
    "train.run_dir", "train.resume", "train.eval_every", "train.save_every", "train.on_nonfinite",
    "train.profile_steps", "data.shards", "data.val_tokens", "train.wandb",
})
FREE_SECTIONS = frozenset({"parallel", "engine", "ops"})


def identity(config: Config) -> dict[str, Any]:
    """The keys of a run that a resume may not change, as {"section.key": value}; plain JSON."""
    kept = {f"{section}.{key}": list(value) if isinstance(value, tuple) else value
            for section, keys in asdict(config).items() if section not in FREE_SECTIONS
            for key, value in keys.items() if f"{section}.{key}" not in FREE_KEYS}
    # The stages as they are meant: a micro-batch is as free here as train.micro_batch_size is, null is no value.
    kept["train.seq_len_warmup"] = [{key: value for key, value in asdict(stage).items()
                                     if key != "micro_batch_size" and value is not None}
                                    for stage in warmup_entries(config)]
    return kept


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One phrase per key that differs."""
    saved = {f"model.{key}": value for key, value in BEFORE_THE_KEY.items()} | saved
    return [f"{key}: saved {saved.get(key)!r}, now {current.get(key)!r}"
            for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]
