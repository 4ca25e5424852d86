"""The published optimizer: AdamW with two groups of weights, and no weight decay on the implicit filters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hyena_dist.config.schema import OptimSection
from hyena_dist.engine.protocol import Table


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], table: Table,
                     weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by their weight decay, each into exactly one group; a group may not be empty.

    Raises:
        ValueError: a parameter is not in the table, or none is trainable.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if name not in table:
            raise ValueError(f"parameter {name} is not in the placement table")
        if parameter.requires_grad:
            (decayed if table[name].weight_decay else undecayed).append(parameter)
    if not decayed and not undecayed:
        raise ValueError("the model has no trainable parameter")
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay},
                                    {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, table: Table, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW over the published groups, fused on CUDA. The learning rate is set at each step."""
    groups = parameter_groups(model.named_parameters(), table, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
                             fused=torch.cuda.is_available())
