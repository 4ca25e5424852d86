"""Frozen weights: those that take no gradient when an engine is built (`requires_grad` False). An engine shards them as
the others, and never changes them: they have no gradient, no part in the norm, no moments and no weight decay."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.parallel.groups import Groups


def frozen_weights(module: nn.Module) -> frozenset[str]:
    """The names of a module's frozen ones."""
    return frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)


def frozen_names(parameters: Mapping[str, Tensor], groups: Groups) -> frozenset[str]:
    """The names of the frozen ones; collective, for ranks that froze others than their peers would wait for them.

    Raises:
        ValueError: on every rank. Two ranks freeze different weights, or there is nothing that is trained.
    """
    frozen = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
    of_rank = [frozen] * groups.world.size
    if groups.world.size > 1:
        dist.all_gather_object(of_rank, frozen, group=groups.world.group)
    for rank, other in enumerate(of_rank):
        if differing := other ^ of_rank[0]:
            raise ValueError(f"parameter {min(differing)} is frozen on one of the ranks 0 and {rank} and trainable on "
                             "the other: freeze the same weights on every rank")
    if len(frozen) == len(parameters):
        raise ValueError("the model has no trainable parameter: leave requires_grad True where it is to learn")
    return frozen


def forget_frozen(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Drop the gradients that frozen weights have of before, which would count in a norm, and take the weights out of
    the optimizer, with their moments and with groups that are then empty, on which DeepSpeed fails."""
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None
    if optimizer is None:
        return
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
