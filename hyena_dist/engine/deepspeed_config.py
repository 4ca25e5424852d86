"""DeepSpeed's configuration from ours: plain dictionaries. Neither deepspeed nor torch is imported, so that a
configuration can be checked anywhere, at once.

No section of DeepSpeed sets the precision: each of `bf16`, `fp16` and `torch_autocast` breaks something (a filter that
is gathered or reduced in bf16, norms and clipping of scaled gradients); the model enters autocast itself.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import EngineSection

if TYPE_CHECKING:
    from hyena_dist.parallel.groups import Groups

_PRECISION = "set train.precision"
_OFFLOAD = "set engine.offload"
_UNSUPPORTED = "it is not supported, leave it out"

OWNED_KEYS: dict[str, str] = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": _UNSUPPORTED,
    "optimizer": "set the keys of the optim section",
    "scheduler": "set optim.lr, optim.min_lr and optim.warmup_steps",
    "gradient_clipping": "set optim.grad_clip",
    "gradient_allreduce_op": _UNSUPPORTED,
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "zero_optimization.compute_grad_norm": "the norm is the guard against gradients that are not finite, leave it out",
    "zero_optimization.zenflow": _UNSUPPORTED,
    "activation_checkpointing": "set train.activation_checkpointing",
    "sequence_parallel_size": "set parallel.context",
    "data_parallel_size": "it follows from parallel.tensor and parallel.context",
    "tensor_parallel": "set parallel.tensor",
    "pipeline": _UNSUPPORTED,
    "curriculum_learning": "set train.seq_len_warmup",
    "data_efficiency": "set train.seq_len_warmup",
    "elasticity": _UNSUPPORTED,
    "autotuning": _UNSUPPORTED,
    "hybrid_engine": _UNSUPPORTED,
}
"""Keys of DeepSpeed that this project sets, and where to set each instead."""


def check_raw_section(raw: Mapping[str, Any]) -> None:
    """Refuse the keys of a raw `engine.deepspeed` section that this project owns.

    Raises:
        ConfigError: naming each such key and what to set instead.
    """
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"engine.deepspeed.zero_optimization must be a mapping of keys, got {zero!r}")
    taken = [f"engine.deepspeed.{key}: {OWNED_KEYS[key]}" for key in _keys(raw) if key in OWNED_KEYS]
    if taken:
        raise ConfigError("keys that do not pass through to DeepSpeed: " + "; ".join(taken))


def deepspeed_config(engine: EngineSection, groups: "Groups", *, micro_batch_size: int, global_batch_size: int,
                     grad_clip: float) -> dict[str, Any]:
    """The dictionary for `prepare_deepspeed`: our keys, with the raw `engine.deepspeed` section merged over the rest.

    Raises:
        ConfigError: the raw section holds a key that we own, or the batch sizes do not fit the ranks.
    """
    check_raw_section(engine.deepspeed)
    accumulate = accumulation_steps(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size,
                                    data_ranks=groups.data.size)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        # True replaces torch.nn.functional.linear in the whole process, for good, and rounds otherwise under autocast.
        zero["memory_efficient_linear"] = False
    host = {"device": "cpu", "pin_memory": True}
    if engine.offload != "none":
        zero["offload_optimizer"] = host
    if engine.offload == "parameters":
        zero["offload_param"] = host
    ours = {
        # DeepSpeed counts every rank that it averages over as data parallel, context ranks too.
        "train_batch_size": micro_batch_size * accumulate * groups.data_context.size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offloaded steps may be of torch's AdamW: `train.optim` chooses
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device every step
    }
    return _merge(ours, engine.deepspeed)


def _keys(raw: Mapping[str, Any]) -> Iterator[str]:
    yield from raw
    yield from (f"zero_optimization.{key}" for key in raw.get("zero_optimization", {}))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
