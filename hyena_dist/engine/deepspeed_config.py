"""DeepSpeed's configuration from ours: plain dictionaries. Neither deepspeed nor torch is imported, so that a
configuration can be checked anywhere, at once.

No section of DeepSpeed sets the precision: each of `bf16`, `fp16` and `torch_autocast` breaks something (a filter that
is gathered or reduced in bf16, norms and clipping of scaled gradients); the model enters autocast itself.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.engine.deepspeed_keys import ALLOWED_KEYS, REFUSED_KEYS

if TYPE_CHECKING:
    from hyena_dist.parallel.groups import Groups

_SECTIONS = frozenset(key[:dot] for key in ALLOWED_KEYS for dot, letter in enumerate(key) if letter == ".")


def check_raw_section(raw: Mapping[str, Any]) -> None:
    """Refuse what a raw `engine.deepspeed` section may not set: `deepspeed_keys` says which keys, with which values.

    Raises:
        ConfigError: naming each such key, and what to set instead, what it takes, or the key that was meant.
    """
    if problems := list(_problems(raw, "")):
        raise ConfigError("; ".join(problems))


_LOWERED = {
    "bf16": "it would round the weights to bfloat16",
    "bfloat16": "it would round the weights to bfloat16",
    "fp16": "it would round the weights to float16",
    "amp": "it would round the weights to float16",
    "torch_autocast": "it would send weights and gradients between the ranks in half precision",
}


def refuse_lower_precision(ds_config: Mapping[str, Any]) -> None:
    """Refuse a configuration of DeepSpeed by which weights, or their gradients, would not stay in float32, which the
    implicit filter needs: in bfloat16 its values are wrong by some 20 %.

    Raises:
        ConfigError: naming the key, and what to set instead.
    """
    zero, types = ds_config.get("zero_optimization") or {}, ds_config.get("data_types") or {}
    reasons = {name: reason for name, reason in _LOWERED.items() if _is_on(ds_config.get(name))}
    reasons |= {name: "it would round the gradients" for name, value in (
        ("communication_data_type", ds_config.get("communication_data_type")),
        ("data_types.grad_accum_dtype", types.get("grad_accum_dtype"))) if value in ("fp16", "bf16", "bfp16")}
    reasons |= {f"zero_optimization.{key}": "it would round what the ranks send each other" for key in (
        "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients") if zero.get(key)}
    for name, reason in reasons.items():
        raise ConfigError(f"ds_config: {name} is set: {reason}, and the implicit filter needs float32: leave it out, "
                          'and build the model with TrainSection(precision="bf16"), which lowers the products alone')


def _is_on(section: Any) -> bool:
    return bool(section.get("enabled", False)) if isinstance(section, Mapping) else bool(section)


def deepspeed_config(engine: EngineSection, groups: "Groups", *, micro_batch_size: int, global_batch_size: int,
                     grad_clip: float) -> dict[str, Any]:
    """The dictionary for `prepare_deepspeed`: our keys, with the raw `engine.deepspeed` section merged over the rest.

    Raises:
        ConfigError: the raw section holds what it may not, or the batch sizes do not fit the ranks.
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


BUCKETS = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000,
           "stage3_prefetch_bucket_size": 50_000_000}
"""DeepSpeed's own sizes, in elements. It allocates a bucket whole, 1.9 GiB, however small the model is."""


def with_buckets(ds_config: Mapping[str, Any], elements: int) -> dict[str, Any]:
    """A copy of DeepSpeed's configuration in which no bucket that it does not set is larger than the model, of which
    this rank has `elements`."""
    rounded = -(-elements // 1024) * 1024  # DeepSpeed wants an even one
    zero = ds_config.get("zero_optimization") or {}
    # A key that is set under its other name would lose against the one that is added.
    sizes = {key: min(size, rounded) for key, size in BUCKETS.items() if key.removeprefix("stage3_") not in zero}
    return _merge({"zero_optimization": sizes} if zero else {}, ds_config)


def _problems(section: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in section.items():
        path = f"{prefix}{key}"
        name = f"engine.deepspeed.{path}"
        if not isinstance(key, str) or "." in key:
            yield f"{name} is not a key of DeepSpeed: sections are mappings inside each other"
        elif path in REFUSED_KEYS:
            yield f"{name} does not pass through to DeepSpeed: {REFUSED_KEYS[path]}"
        elif path in ALLOWED_KEYS:
            if not ALLOWED_KEYS[path].fits(value):
                yield f"{name} must be {ALLOWED_KEYS[path].what}, got {value!r}"
        elif path not in _SECTIONS:
            yield f"{name} is not a key of DeepSpeed: {_nearest(key, prefix)}"
        elif isinstance(value, Mapping):
            yield from _problems(value, f"{path}.")
        else:
            yield f"{name} must be a mapping of keys, got {value!r}"


def _nearest(key: str, prefix: str) -> str:
    """The key that was meant: one of the same section, or one of this name in another."""
    known = [*ALLOWED_KEYS, *REFUSED_KEYS, *_SECTIONS]
    beside = {path.removeprefix(prefix).lower(): path for path in known
              if path.startswith(prefix) and "." not in path.removeprefix(prefix)}
    close = difflib.get_close_matches(key.lower(), beside, n=1, cutoff=0.75)
    found = [beside[name] for name in close] or [path for path in known if path.rpartition(".")[2] == key]
    if not found:
        return "leave it out"
    refused = f" It does not pass through either: {REFUSED_KEYS[found[0]]}" if found[0] in REFUSED_KEYS else ""
    return f"did you mean {found[0]}?{refused}"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
