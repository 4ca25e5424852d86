"""DeepSpeed ZeRO, stages 0 to 3, behind the Engine protocol, with the cures for what its releases get wrong.

Nothing here knows Hyena: a model, an optimizer and a placement table come as arguments.
"""

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # importing deepspeed warns otherwise

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from hyena_dist.config.errors import ConfigError, first_sentence
from hyena_dist.engine.adam import create_state, guard, require_adam, set_step_count, step_count
from hyena_dist.engine.deepspeed_config import refuse_lower_precision, with_buckets
from hyena_dist.engine.frozen import forget_frozen, frozen_names, refuse_change
from hyena_dist.engine.grad_norm import clip_gradients, global_grad_norm
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import MOMENTS, StepResult, Table, group_lr, refuse_more, step_is_due
from hyena_dist.parallel.groups import Axis, Groups


class _Mpu:
    """Our groups under the names by which DeepSpeed asks for them. No sequence group: with one, ZeRO-3 scales gradients
    by its size; context ranks count as data ranks."""

    def __init__(self, groups: Groups) -> None:
        self._data = _with_group(groups.data_context)
        self._tensor = _with_group(groups.tensor)

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def prepare_deepspeed(model: nn.Module, ds_config: Mapping[str, Any], groups: Groups, table: Table | None = None, *,
                      optimizer: torch.optim.Optimizer | None = None,
                      loss_scaler: LossScaler | None = None) -> "DeepSpeedEngine":
    """Hand a model to DeepSpeed, after `init_distributed`.

    Args:
        ds_config: DeepSpeed's configuration; `deepspeed_config` makes one from ours. Buckets that it does not set are
            no larger than the model.
        table: which parameters are split over the tensor ranks; needed only where there are several.
        optimizer: Adam (`engine.adam`) over the model's parameters; None: DeepSpeed makes it from `ds_config`. The
            engine takes weights out of it that are frozen (`requires_grad` False), and groups with no others.
        loss_scaler: for a model that computes in fp16.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ConfigError: DeepSpeed refuses a key of `ds_config`, or one would lower the precision of the weights.
        ValueError: tensor ranks without a table, no optimizer or one that is no Adam; nothing is trained, or the ranks
            froze different weights.
    """
    _check_arguments(ds_config, groups, table, optimizer)
    frozen = frozen_names(dict(model.named_parameters()), groups)
    forget_frozen(model.parameters(), optimizer)
    if groups.tensor.size > 1 and table is not None:
        for name, parameter in model.named_parameters():
            # DeepSpeed's gradient norm counts a parameter on every tensor rank with this attribute, else on the first.
            parameter.tensor_model_parallel = table[name].tp_dim is not None  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        # Only inference uses this op; building it takes a compiler and a minute, and a stale lock hangs every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls them under their old names, and the warning would come at every collective.
    warnings.filterwarnings("ignore", category=FutureWarning,
                            message=r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; every launcher sets it
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        settings = with_buckets(ds_config, sum(shape.numel() for shape in shapes.values()))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=_Mpu(groups))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"engine.deepspeed: {'.'.join(map(str, first['loc']))} of {error.title}: {first['msg']}: "
                          "correct the key, or leave it out") from error
    except (DeepSpeedConfigError, AssertionError, NotImplementedError, ValueError) as error:  # its own checks
        raise ConfigError(f"engine.deepspeed: DeepSpeed refuses its configuration: {first_sentence(error)}: correct "
                          "the key, or leave it out") from error
    believed = (engine.dp_world_size, engine.mp_world_size)
    assert believed == (groups.data_context.size, groups.tensor.size), f"DeepSpeed believes in {believed} ranks"
    assert engine.train_batch_size() == (engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()
                                         * groups.data_context.size), "DeepSpeed believes in another batch"
    return DeepSpeedEngine(engine, shapes, frozen, groups, table, loss_scaler)


class DeepSpeedEngine:
    """An initialised `deepspeed.DeepSpeedEngine` as our Engine."""

    def __init__(self, engine: Any, shapes: Mapping[str, torch.Size], frozen: frozenset[str], groups: Groups,
                 table: Table | None = None, loss_scaler: LossScaler | None = None) -> None:
        self._engine = engine
        self._stage = int(engine.zero_optimization_stage())
        self._shapes = dict(shapes)
        self._parameters = dict(engine.module.named_parameters())
        self._frozen = frozen
        self._data, self._tensor = groups.data_context, groups.tensor
        self._table = table
        self._micro_batch = 0
        self._max_norm = engine.gradient_clipping() or math.inf
        self.loss_scaler = loss_scaler
        # Stage 0 keeps torch's optimizer; the others wrap it around flat partitions of the weights.
        self._optimizer: torch.optim.Optimizer = engine.optimizer if self._stage == 0 else engine.optimizer.optimizer
        require_adam(self._optimizer)
        if self._stage == 0:
            engine.clip_fp32_gradients = lambda: None  # `step` has clipped: it must see the norm before the update
        self._create_optimizer_state()

    @property
    def module(self) -> nn.Module:
        return self._engine

    @property
    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        return self._shapes

    @property
    def frozen(self) -> frozenset[str]:
        return self._frozen

    @property
    def accumulation_steps(self) -> int:
        return self._engine.gradient_accumulation_steps()

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        assert self._micro_batch == 0, "micro-batches of a step are under way"
        # For its own logs: `backward` says where a step ends, and that the loss is not to be divided.
        self._engine.set_train_batch_size(steps * self._engine.train_micro_batch_size_per_gpu() * self._data.size)

    def backward(self, loss: torch.Tensor) -> None:
        refuse_more(self._micro_batch, self.accumulation_steps)
        refuse_change(self._parameters, self._frozen)
        if self.loss_scaler is not None:
            if self._stage == 0:
                loss = loss * self.loss_scaler.scale
            else:
                self._engine.optimizer.override_loss_scale(self.loss_scaler.scale)
        self._micro_batch += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_batch == self.accumulation_steps)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float | None = None) -> StepResult:
        """As the protocol; without `lr` the learning rate stays as the optimizer or DeepSpeed's scheduler has it."""
        if not step_is_due(self._micro_batch, self.accumulation_steps):
            return StepResult(torch.tensor(math.nan), known=False, pending=True)
        self._micro_batch = 0
        if lr is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = group_lr(group, lr)
        applied: bool | None
        norm, applied = self._step_whole() if self._stage == 0 else self._step_sharded()
        overflow = self.loss_scaler is not None and self.loss_scaler.update(finite=bool(applied))
        return StepResult(norm, applied, overflow)

    def _step_whole(self) -> tuple[torch.Tensor, bool | None]:
        """Stage 0 would apply a step that is not finite, which the others skip, and knows no loss scale. None: applied
        if the norm is finite."""
        gradients = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        scale = 1.0 if self.loss_scaler is None else self.loss_scaler.scale
        norm = global_grad_norm(gradients, self._table, self._tensor, device=self._engine.device) / scale
        # A loss scale is a number of the host, which must know.
        applied = None if self.loss_scaler is None and guard(self._optimizer, norm) else bool(torch.isfinite(norm))
        if applied is False:
            self._engine.zero_grad()
            return norm, False
        clip_gradients(gradients.values(), norm, self._max_norm, loss_scale=scale)
        self._engine.step()
        return norm, applied

    def _step_sharded(self) -> tuple[torch.Tensor, bool]:
        self._engine.step()
        return (torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32),
                self._engine.was_step_applied())

    def export_parameter(self, name: str) -> dict[str, torch.Tensor]:
        parameter = self._parameters[name]
        if name in self._frozen:
            with self._gathered(parameter):
                return {"weight": parameter.detach().float().clone()}
        if self._stage == 0:
            state = self._optimizer.state[parameter]
            tensors = {"weight": parameter.detach(), **{key: state[key] for key in MOMENTS}}
        else:
            tensors = {"weight": safe_get_full_fp32_param(parameter),
                       **{key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}}
        return {key: tensor.float() for key, tensor in tensors.items()}

    @torch.no_grad()
    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        parameter = self._parameters[name]
        weight = state["weight"].to(self._engine.device)
        assert weight.shape == self._shapes[name], f"{name}: {tuple(weight.shape)} is not {tuple(self._shapes[name])}"
        if name in self._frozen:
            with self._gathered(parameter, modified=True):
                parameter.copy_(weight)
        elif self._stage == 0:
            parameter.copy_(weight)
            for key in MOMENTS:
                self._optimizer.state[parameter][key].copy_(state[key])
        elif self._stage == 3:
            # DeepSpeed's setters of full values fail where the size is no multiple of the data ranks.
            safe_set_local_fp32_param(parameter, self._shard(weight))
            for key in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._shard(state[key]), key)
            with self._gathered(parameter, modified=True):
                parameter.copy_(weight)
        else:
            safe_set_full_fp32_param(parameter, weight)
            parameter.copy_(weight)  # the line above sets the optimizer's own copy only
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[key], key)

    @property
    def optimizer_step_count(self) -> int:
        return step_count(self._optimizer, self._flat_weights())

    @optimizer_step_count.setter
    def optimizer_step_count(self, steps: int) -> None:
        set_step_count(self._optimizer, self._flat_weights(), steps)

    def _gathered(self, parameter: nn.Parameter, *, modified: bool = False) -> AbstractContextManager[Any]:
        """A context in which the parameter is whole. What every rank sets there in the same way stays."""
        if self._stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)

    def _flat_weights(self) -> list[torch.Tensor]:
        """What the optimizer's state is keyed by."""
        if self._stage == 0:
            return [parameter for name, parameter in self._parameters.items() if name not in self._frozen]
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._engine.optimizer, name))

    def _create_optimizer_state(self) -> None:
        """Let the state be read and set before the first step.

        At stages 1 and 2 this also lets every parameter group be linked to its moments: DeepSpeed links all groups
        after the first group's first step, when the others have no state yet, and never again.
        """
        create_state(self._optimizer, self._flat_weights())
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part at stage 3: equal parts of the flat tensor, the last one padded."""
        size = -(-full.numel() // self._data.size)
        flat = nn.functional.pad(full.reshape(-1), (0, size * self._data.size - full.numel()))
        return flat.narrow(0, size * self._data.rank, size)


def prebuilt_cpu_adam() -> type[DeepSpeedCPUAdam] | None:
    """DeepSpeed's Adam for offloaded weights, if its operator was built when DeepSpeed was (DS_BUILD_CPU_ADAM=1).

    It is not built here: that takes minutes and a compiler, a stale lock hangs it in silence, and torch's fused AdamW
    takes 1.15 times as long.
    """
    built = installed_ops.get("cpu_adam", False) and accelerator_name == get_accelerator()._name
    return DeepSpeedCPUAdam if built else None


def _check_arguments(ds_config: Mapping[str, Any], groups: Groups, table: Table | None,
                     optimizer: torch.optim.Optimizer | None) -> None:
    refuse_lower_precision(ds_config)
    if not dist.is_initialized():
        raise RuntimeError("call hyena_dist.runtime.launch.init_distributed() before prepare_deepspeed()")
    if groups.tensor.size > 1 and table is None:
        raise ValueError(f"with {groups.tensor.size} tensor ranks the placement table of the model is needed")
    if optimizer is not None:
        require_adam(optimizer)
    elif "optimizer" not in ds_config:
        raise ValueError("pass an optimizer, or an optimizer section in the DeepSpeed configuration")


def _with_group(axis: Axis) -> Axis:
    """DeepSpeed wants a group for every axis; an axis of one process without groups is the whole world."""
    return axis if axis.group is not None else Axis(dist.group.WORLD, axis.rank, axis.size)
