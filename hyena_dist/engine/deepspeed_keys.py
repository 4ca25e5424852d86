"""The keys of DeepSpeed's configuration: which of them a raw `engine.deepspeed` section may set, and with what.

A table, so that a configuration can be checked without importing DeepSpeed; a test compares it with DeepSpeed's own
configuration models. What is let through tunes or reports. Everything else is refused by name: what this project sets
itself, what would write files or call services outside the run directory, what changes the numbers or the checkpoints
behind the back of a run, and what does nothing here. So weights and gradients travel in float32 only, whatever the key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a key takes."""

    what: str
    """In a message, after "must be"."""
    fits: Callable[[Any], bool]


def _whole(least: int) -> Kind:
    """Also 5e8, which YAML reads as a number with a fraction."""
    return Kind(f"a whole number of at least {least}", lambda value: type(value) in (int, float) and least <= value
                < 2**63 and value == int(value))


def _word(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


_SWITCH = Kind("true or false", lambda value: type(value) is bool)
_NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(type(name) is str for name in value))

ALLOWED_KEYS: dict[str, Kind] = {
    "steps_per_print": _whole(1),
    "log_level": _word("debug", "info", "warning", "error", "critical"),
    "dump_state": _SWITCH,
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "disable_python_gc": _SWITCH,
    "communication_data_type": Kind("fp32, for fp16 and bf16 would round the gradients", lambda value: value == "fp32"),
    "prescale_gradients": _SWITCH,
    "comms_logger.enabled": _SWITCH,
    "comms_logger.prof_all": _SWITCH,
    "comms_logger.prof_ops": _NAMES,
    "comms_logger.verbose": _SWITCH,
    "comms_logger.debug": _SWITCH,
    "flops_profiler.enabled": _SWITCH,
    "flops_profiler.recompute_fwd_factor": Kind("a number of at least 0", lambda value: type(value) in (int, float)
                                                and 0 <= value < math.inf),
    "flops_profiler.profile_step": _whole(1),
    "flops_profiler.module_depth": _whole(-1),
    "flops_profiler.top_modules": _whole(1),
    "flops_profiler.detailed": _SWITCH,
    "timers.throughput.enabled": _SWITCH,
    "timers.throughput.synchronized": _SWITCH,
    "zero_optimization.contiguous_gradients": _SWITCH,
    "zero_optimization.reduce_scatter": _SWITCH,
    "zero_optimization.reduce_bucket_size": _whole(1),
    "zero_optimization.use_multi_rank_bucket_allreduce": _SWITCH,
    "zero_optimization.allgather_partitions": _SWITCH,
    "zero_optimization.allgather_bucket_size": _whole(1),
    "zero_optimization.overlap_comm": _SWITCH,
    "zero_optimization.sub_group_size": _whole(1),
    "zero_optimization.parameter_alignment": _SWITCH,
    "zero_optimization.ignore_unused_parameters": _SWITCH,
    "zero_optimization.log_trace_cache_warnings": _SWITCH,
    "zero_optimization.enable_sanity_checks": _SWITCH,
    "zero_optimization.stage3_prefetch_bucket_size": _whole(0),
    "zero_optimization.stage3_param_persistence_threshold": _whole(0),
    "zero_optimization.stage3_model_persistence_threshold": _whole(0),
    "zero_optimization.stage3_max_live_parameters": _whole(0),
    "zero_optimization.stage3_max_reuse_distance": _whole(0),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _SWITCH,
    "zero_optimization.stage3_allgather_sequential": _SWITCH,
}
"""Keys that reach DeepSpeed, sections spelt out with dots."""

_PRECISION = "set train.precision"
_OFFLOAD = "set engine.offload"
_UNSUPPORTED = "it is not supported, leave it out"
_REMOVED = "DeepSpeed has removed it, leave it out"
_WARMUP = "set train.seq_len_warmup"
_MONITOR = "a run writes its metrics and TensorBoard's curves in train.run_dir, leave it out"
_CHECKPOINT = "checkpoints are not DeepSpeed's here: set train.save_every and train.resume, leave it out"
_LOSSY = "it would change the weights that are gathered or the gradients, leave it out"
_NO_EFFECT = "it has no effect here, leave it out"

REFUSED_KEYS: dict[str, str] = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": _UNSUPPORTED,
    "optimizer": "set the keys of the optim section",
    "scheduler": "set optim.lr, optim.min_lr and optim.warmup_steps",
    "gradient_clipping": "set optim.grad_clip",
    "gradient_allreduce_op": _UNSUPPORTED,
    "gradient_predivide_factor": "gradients travel in float32, which needs none, and at stage 3 DeepSpeed does not "
                                 "undo one that is the number of ranks, leave it out",
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
    "zero_optimization.save_muon_momentum_buffer_in_memory": _NO_EFFECT,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "zero_allow_untested_optimizer": "optimizers are chosen here, leave it out",
    "zero_optimization.compute_grad_norm": "the norm is the guard against gradients that are not finite, leave it out",
    "zero_optimization.zenflow": _UNSUPPORTED,
    "zero_optimization.leaf_module": _UNSUPPORTED,
    "zero_optimization.module_granularity_threshold": _UNSUPPORTED,  # its backward pass fails on narrow layers
    "zero_optimization.stage3_module_granularity_threshold": _UNSUPPORTED,
    "zero_optimization.round_robin_gradients": "its order of the weights is not that of their state in checkpoints, "
                                               "leave it out",
    "zero_optimization.memory_efficient_linear": "it replaces torch.nn.functional.linear in the whole process, rounds "
                                                 "otherwise and fails on narrow layers, leave it out",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.override_module_apply": _NO_EFFECT,
    "zero_optimization.zero_hpz_partition_size": "a second copy of the weights would miss a resume, leave it out",
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    # Both names of these are DeepSpeed's, and of two values it would take one without a word.
    **{key.replace(".stage3_", "."): f"write {key.rpartition('.')[2]}" for key in ALLOWED_KEYS if ".stage3_" in key},
    **{f"zero_optimization.{key}": _CHECKPOINT for key in (
        "load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint",
        "gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save")},
    "flops_profiler.output_file": "it would overwrite that file; the profile is printed, and train.profile_steps "
                                  "writes one in train.run_dir",
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": _MONITOR,
    "comet": _MONITOR,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": _REMOVED,
    "aio": "nothing is offloaded to disks here, leave it out",
    "compile": _UNSUPPORTED,
    "activation_checkpointing": "set train.activation_checkpointing",
    "sequence_parallel_size": "set parallel.context",
    "seq_parallel_communication_data_type": "set parallel.context",
    "data_parallel_size": "it follows from parallel.tensor and parallel.context",
    "tensor_parallel": "set parallel.tensor",
    "expert_parallel": _UNSUPPORTED,
    "use_data_before_expert_parallelism": _UNSUPPORTED,
    "pipeline": _UNSUPPORTED,
    "curriculum_learning": _WARMUP,
    "data_efficiency": _WARMUP,
    "elasticity": _UNSUPPORTED,
    "autotuning": _UNSUPPORTED,
    "hybrid_engine": _UNSUPPORTED,
    "weight_quantization": _LOSSY,
    "dataloader_drop_last": _NO_EFFECT,
    "disable_allgather": _NO_EFFECT,
    "vocabulary_size": _NO_EFFECT,
    **{key: _REMOVED for key in ("compression_training", "quantize_training", "sparse_gradients", "eigenvalue",
                                 "sparse_attention", "graph_harvesting", "progressive_layer_drop")},
}
"""Keys of DeepSpeed that do not pass, and what to do instead."""
