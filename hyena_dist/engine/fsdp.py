"""PyTorch's FSDP2 behind the Engine protocol, and its sharding alone for someone else's loop.

There is no mixed-precision policy: parameters and gradients are float32, the model enters autocast itself.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hyena_dist.engine.adam import create_state, guard, require_adam, set_step_count, step_count
from hyena_dist.engine.frozen import forget_frozen, frozen_names, refuse_change
from hyena_dist.engine.grad_norm import clip_gradients, global_grad_norm
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import MOMENTS, StepResult, Table, group_lr, refuse_more, step_is_due
from hyena_dist.parallel.groups import Groups

Model = TypeVar("Model", bound=nn.Module)


def apply_fsdp2(model: Model, groups: Groups, *, blocks: Iterable[nn.Module] | None = None,
                offload: bool = False) -> Model:
    """Shard a model over the data and context ranks, in place: after `init_distributed`, before its optimizer is made.

    Gradients are averaged over these ranks; what is split over the tensor ranks stays so. torch's gradient norm knows
    nothing of the tensor ranks: take `clip_grad_norm`.

    Args:
        model: on the rank's device, or on the meta device until `to_empty` and `reset_parameters` fill it; every
            parameter float32.
        blocks: the modules whose weights are gathered together; None: the elements of the model's ModuleLists.
        offload: keep weights, gradients and so the optimizer's state in the host's memory.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError("call hyena_dist.runtime.launch.init_distributed() before apply_fsdp2()")
    group = groups.data_context.group or dist.group.WORLD
    assert group is not None
    device = next(model.parameters()).device.type
    if device == "meta":
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mesh = DeviceMesh.from_group(group, device)
    policy = CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy()
    for block in _blocks(model) if blocks is None else blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    # Between passes every weight is sharded, the root's too: an evaluation leaves no gathered copy that outlives a
    # change of the weights.
    fully_shard(model, mesh=mesh, offload_policy=policy, reshard_after_forward=True)
    return model


def clip_grad_norm(parameters: Iterable[tuple[str, nn.Parameter]], table: Table | None, groups: Groups,
                   max_norm: float, *, loss_scale: float = 1.0) -> torch.Tensor:
    """Divide the gradients of sharded parameters by the loss scale and clip them by their global norm; collective.

    Returns:
        The norm before clipping, without the loss scale: 0-dim, the same on every rank, inf or nan if a gradient is.

    Args:
        parameters: `named_parameters()` of a model that `apply_fsdp2` has sharded.
        table: which parameters are split over the tensor ranks; needed only where there are several.
        max_norm: infinite: no clipping.
    """
    gradients: dict[str, torch.Tensor] = {}
    device = "cpu"
    for name, parameter in parameters:
        if parameter.requires_grad and isinstance(parameter.grad, DTensor):  # one of before it was frozen counts not
            gradients[name] = parameter.grad.to_local()
            device = parameter.grad.device_mesh.device_type  # offloaded gradients are on the host, the groups are not
    norm = global_grad_norm(gradients, table, groups.tensor, groups.data_context,
                            device=torch.device(device)) / loss_scale
    clip_gradients(gradients.values(), norm, max_norm, loss_scale=loss_scale)
    return norm


class FsdpEngine:
    """A model that `apply_fsdp2` has sharded, and its optimizer, as our Engine.

    Args:
        optimizer: torch's Adam or AdamW over the sharded parameters. The engine takes weights out of it that are frozen
            (`requires_grad` False), and groups with no others.
        table: which parameters are split over the tensor ranks; needed only where there are several.
        grad_clip: largest global gradient norm; 0: no clipping.
        loss_scaler: for a model that computes in fp16.

    Raises:
        ValueError: tensor ranks without a table, a model or an optimizer that is not sharded; nothing is trained, or
            the ranks froze different weights.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, table: Table | None = None,
                 *, grad_clip: float = 0.0, accumulation_steps: int = 1, loss_scaler: LossScaler | None = None) -> None:
        self._parameters = dict(model.named_parameters())
        _check_arguments(self._parameters, optimizer, groups, table)
        self._frozen = frozen_names(self._parameters, groups)
        forget_frozen(self._parameters.values(), optimizer)
        assert isinstance(model, FSDPModule)
        # The engine changes no output in place, which is what FSDP2 warns of at every model that returns a view.
        warnings.filterwarnings("ignore", category=UserWarning, message=r"FSDP2-wrapped module .* returned a view")
        self._model = model
        self._optimizer = optimizer
        self._table = table
        self._groups = groups
        self._max_norm = grad_clip or math.inf
        self._accumulation_steps = accumulation_steps
        self._micro_batch = 0
        self.loss_scaler = loss_scaler
        create_state(optimizer, self._trained())

    @property
    def module(self) -> nn.Module:
        return self._model

    @property
    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    @property
    def frozen(self) -> frozenset[str]:
        return self._frozen

    @property
    def accumulation_steps(self) -> int:
        return self._accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        assert self._micro_batch == 0, "micro-batches of a step are under way"
        self._accumulation_steps = steps

    def backward(self, loss: torch.Tensor) -> None:
        refuse_more(self._micro_batch, self._accumulation_steps)
        refuse_change(self._parameters, self._frozen)
        self._micro_batch += 1
        self._model.set_requires_gradient_sync(self._micro_batch == self._accumulation_steps)
        (loss * self._loss_scale).backward()

    def step(self, lr: float | None = None) -> StepResult:
        """As the protocol; without `lr` the learning rate stays as the optimizer has it."""
        if not step_is_due(self._micro_batch, self._accumulation_steps):
            return StepResult(torch.tensor(math.nan), known=False, pending=True)
        self._micro_batch = 0
        norm = clip_grad_norm(self._parameters.items(), self._table, self._groups, self._max_norm,
                              loss_scale=self._loss_scale)
        if lr is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = group_lr(group, lr)
        # A loss scale is a number of the host, which must know.
        applied = None if self.loss_scaler is None and guard(self._optimizer, norm) else bool(torch.isfinite(norm))
        if applied is not False:
            self._optimizer.step()
        self._optimizer.zero_grad()
        overflow = self.loss_scaler is not None and self.loss_scaler.update(finite=bool(applied))
        return StepResult(norm, applied, overflow)

    def export_parameter(self, name: str) -> dict[str, torch.Tensor]:
        return {key: _full(tensor) for key, tensor in self._state(name).items()}

    @torch.no_grad()
    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        for key, target in self._state(name).items():
            full = state[key].to(target.device_mesh.device_type)
            assert full.shape == target.shape, f"{name}: {tuple(full.shape)} is not {tuple(target.shape)}"
            # Every rank has the full tensor: each takes its own part of it.
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None))

    @property
    def optimizer_step_count(self) -> int:
        return step_count(self._optimizer, self._trained())

    @optimizer_step_count.setter
    def optimizer_step_count(self, steps: int) -> None:
        set_step_count(self._optimizer, self._trained(), steps)

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.loss_scaler is None else self.loss_scaler.scale

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self._parameters.items() if name not in self._frozen]

    def _state(self, name: str) -> dict[str, DTensor]:
        parameter = self._parameters[name]
        tensors = {"weight": parameter.detach()}
        if name not in self._frozen:
            tensors |= {key: self._optimizer.state[parameter][key] for key in MOMENTS}
        return {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor)}


def _full(sharded: DTensor) -> torch.Tensor:
    moved = sharded.to(sharded.device_mesh.device_type)  # offloaded tensors are on the host, the groups are not
    assert isinstance(moved, DTensor)
    return moved.full_tensor().float()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost ModuleLists."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _check_arguments(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, groups: Groups,
                     table: Table | None) -> None:
    if groups.tensor.size > 1 and table is None:
        raise ValueError(f"with {groups.tensor.size} tensor ranks the placement table of the model is needed")
    require_adam(optimizer)
    optimized = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            raise ValueError(f"parameter {name} is not sharded: call apply_fsdp2() on the model first")
        if parameter.requires_grad and id(parameter) not in optimized:
            raise ValueError(f"the optimizer does not have parameter {name}: make it after apply_fsdp2(), which "
                             "replaces the parameters")
