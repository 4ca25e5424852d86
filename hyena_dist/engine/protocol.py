"""What the trainer and the checkpoints ask of an engine: the owner of gradients, optimizer state and their sharding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hyena_dist.engine.loss_scale import LossScaler

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state beside each weight, by torch's names."""
FIELDS = ("weight", *MOMENTS)
"""What `Engine.export_parameter` returns of a weight that is trained."""


class Placed(Protocol):
    """The entry of a placement table for one weight, as far as engines and checkpoints read it."""

    @property
    def tp_dim(self) -> int | None:
        """Dimension split over the tensor ranks; None: every tensor rank holds the whole weight."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the equal blocks along dimension 0 of a fused weight."""

    @property
    def weight_decay(self) -> bool:
        """Whether the optimizer decays it."""

    @property
    def lr_scale(self) -> float:
        """What its learning rate is of the run's."""


Table = Mapping[str, Placed]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: torch.Tensor
    """Global norm of the gradients before clipping and without the loss scale, 0-dim, the same on every rank; inf or
    nan when not finite."""
    known: bool | None = None
    """Whether the update was applied; None: if the norm is finite, which the device alone knows as yet."""
    overflow: bool = False
    """Not applied, and the loss scale was lowered: an expected event of fp16. A step that is not applied without it is
    a failure, be it that there is no loss scale or that it is at its lowest."""
    pending: bool = False
    """Micro-batches of the step are still to come: nothing was done, and there is no norm yet (nan)."""

    @property
    def applied(self) -> bool:
        """False when the gradients were not finite: weights, moments and the step count are then as before. May wait
        for the device."""
        return bool(torch.isfinite(self.grad_norm)) if self.known is None else self.known


def step_is_due(micro_batch: int, accumulation_steps: int) -> bool:
    """Whether a step has all its micro-batches; False: it is pending.

    Raises:
        RuntimeError: it has none.
    """
    if micro_batch == 0:
        raise RuntimeError("step() without a backward() since the last one: call backward() first")
    return micro_batch == accumulation_steps


def refuse_more(micro_batch: int, accumulation_steps: int) -> None:
    """Raises RuntimeError: a step has all its micro-batches."""
    if micro_batch == accumulation_steps:
        raise RuntimeError(f"backward() after the {accumulation_steps} micro-batches of a step: call step() first")


def group_lr(group: Mapping[str, Any], lr: float) -> float:
    """The learning rate of a parameter group of the optimizer, of which lr_scale says what it is of the run's."""
    return lr * group.get("lr_scale", 1.0)


class Engine(Protocol):
    """One optimizer step is `accumulation_steps` times `backward`, then `step` once; `step` may be called after each
    `backward`, as with DeepSpeed, and does nothing before the last. Every method is collective.

    Parameters go by the names of the bare module's `named_parameters()`. A weight's full value is the value without the
    sharding over the data ranks; over the tensor ranks it stays as the model splits it.
    """

    accumulation_steps: int
    """Micro-batches of a step; may be set between steps."""

    @property
    def module(self) -> nn.Module:
        """Call it for every forward pass, of training and of evaluation."""

    @property
    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """The full shape of every parameter, in the model's order."""

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that took no gradient when the engine was built. They have a weight and no other field."""

    @property
    def loss_scaler(self) -> LossScaler | None:
        """The loss scale of fp16, part of a run's state; None: losses are not scaled."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch. They are averaged over the data ranks and summed over micro-batches,
        so `loss` is the rank's sum times (data ranks) / (global count of the step). The engine scales it for fp16.

        Raises:
            ValueError: a weight was frozen or thawed after the engine was built.
        """

    def step(self, lr: float) -> StepResult:
        """Clip, update the weights at this learning rate times the `lr_scale` of their parameter group (`group_lr`),
        and clear the gradients; nothing changes if not finite."""

    def export_parameter(self, name: str) -> dict[str, torch.Tensor]:
        """The FIELDS of one parameter, of a frozen one the weight alone: full float32 tensors, on every rank."""

    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Set the FIELDS of one parameter, of a frozen one the weight alone, from full tensors."""

    @property
    def optimizer_step_count(self) -> int:
        """Steps applied so far, Adam's count for its bias correction."""

    @optimizer_step_count.setter
    def optimizer_step_count(self, steps: int) -> None: ...
