"""Frozen weights: those that take no gradient when an engine is built (`requires_grad` False). An engine shards them as
the others, and never changes them: they have no gradient, no part in the norm, no moments and no weight decay."""

from collections.abc import Mapping

import torch
from torch import Tensor


def frozen_names(parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the frozen ones.

    Raises:
        ValueError: there is no other.
    """
    frozen = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
    if len(frozen) == len(parameters):
        raise ValueError("the model has no trainable parameter: leave requires_grad True where it is to learn")
    return frozen


def drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Take frozen weights out of an optimizer, and groups that are then empty, on which DeepSpeed fails."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not weight.requires_grad:
                optimizer.state.pop(weight, None)
        group["params"] = [weight for weight in group["params"] if weight.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def refuse_change(parameters: Mapping[str, Tensor], frozen: frozenset[str]) -> None:
    """Refuse weights that were frozen or thawed since the engine was built: their moments, or the lack of them, would
    move them or hold them all the same.

    Raises:
        ValueError: naming one of them.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad == (name in frozen):
            change = "trainable" if parameter.requires_grad else "frozen"
            raise ValueError(f"parameter {name} was made {change} after the engine was built, which has no effect: set "
                             "requires_grad first, and then build the optimizer and the engine")
