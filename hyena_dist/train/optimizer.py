"""The published optimizer: AdamW with two groups of weights, and no weight decay on the implicit filters. Where weights
have learning rates of their own there are more groups."""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.engine.protocol import Table

logger = logging.getLogger(__name__)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], table: Table,
                     weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by their weight decay and the scale of their learning rate, each into exactly one
    group. A group has `lr_scale` where that is not 1; engines multiply the run's learning rate by it.

    Raises:
        ValueError: a parameter is not in the table, or none is trainable.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if name not in table:
            raise ValueError(f"parameter {name} is not in the placement table")
        if parameter.requires_grad:
            found.setdefault((table[name].weight_decay, table[name].lr_scale), []).append(parameter)
    if not found:
        raise ValueError("the model has no trainable parameter")
    return [{"params": found[decayed, scale], "weight_decay": weight_decay if decayed else 0.0}
            | ({} if scale == 1 else {"lr_scale": scale}) for decayed, scale in sorted(found, reverse=True)]


def build_optimizer(model: nn.Module, table: Table, optim: OptimSection,
                    engine: EngineSection | None = None) -> torch.optim.Optimizer:
    """AdamW over the published groups, by the best implementation there is. The learning rate is set at each step.

    On CUDA that is NVIDIA Apex's FusedAdam where it is installed and fits the engine; for state that DeepSpeed keeps on
    the host DeepSpeedCPUAdam where its operator was built; else torch's fused AdamW, on CPUs too, where a step takes a
    quarter of the time of the unfused one and differs by 6e-8.

    Args:
        engine: that will drive it; None: a loop of your own.
    """
    groups = parameter_groups(model.named_parameters(), table, optim.weight_decay)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps}
    if engine is not None and engine.name == "deepspeed" and engine.offload != "none":
        from hyena_dist.engine.deepspeed import prebuilt_cpu_adam  # importing deepspeed takes seconds
        cpu_adam = prebuilt_cpu_adam()
        if cpu_adam is not None:
            logger.info("optimizer: DeepSpeedCPUAdam")
            return cpu_adam(groups, adamw_mode=True, **settings)
    elif _on_cuda(model) and _takes_apex(engine):
        fused_adam = nvidia_apex()
        if fused_adam is not None:
            logger.info("optimizer: FusedAdam of NVIDIA Apex")
            return fused_adam(groups, adam_w_mode=True, **settings)
    logger.info("optimizer: torch's fused AdamW")
    return torch.optim.AdamW(groups, fused=True, **settings)


def nvidia_apex() -> Callable[..., torch.optim.Optimizer] | None:
    """FusedAdam of NVIDIA's Apex, if that is installed with its CUDA extensions.

    PyPI's package of the same name is a web toolkit: it is told apart by its files, and not imported.
    """
    package = importlib.util.find_spec("apex")
    if package is None:
        return None
    directories = list(package.submodule_search_locations or ())
    if not any(Path(directory, "optimizers", "fused_adam.py").is_file() for directory in directories):
        logger.warning("the package `apex` in %s is not NVIDIA's and is left alone: uninstall it",
                       ", ".join(directories) or package.origin)
        return None
    if importlib.util.find_spec("amp_C") is None:
        logger.warning("NVIDIA Apex is installed without its CUDA extensions (amp_C) and is left alone: build it with "
                       "them, or uninstall it")
        return None
    return importlib.import_module("apex.optimizers").FusedAdam


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def _takes_apex(engine: EngineSection | None) -> bool:
    """Apex counts the steps of a whole parameter group and fails on an empty one. ZeRO-3 steps a part of a group at a
    time with the other groups emptied, and FSDP2's weights are distributed tensors, which its kernels do not know."""
    return engine is None or (engine.name == "deepspeed" and engine.zero_stage < 3)
