"""What every value of train.activation_checkpointing costs: the same training step of the same model."""

import torch

from benchmarks.compare import TOLERANCE, Case, Measured
from benchmarks.models import Size
from benchmarks.step import moved_bytes, new_model, our_step, token_ids
from hyena_dist.config.sections.train import TrainSection

VALUES = ("none", "selective", "block", "full")


def values() -> list[str]:
    """Those that the schema takes; "none" is the first."""
    return [value for value in VALUES if _taken(value)]


def _taken(value: str) -> bool:
    try:
        return bool(TrainSection(activation_checkpointing=value))
    except ValueError:
        return False


def recompute(size: Size, device: torch.device, precision: str) -> Case:
    """One side per value, the one without recomputation first."""
    section = size.section()
    exact = our_step(new_model(section, device).double(), device, "fp32")
    moved = moved_bytes(section, size, precision)
    return Case(size.length, size.batch, lambda turn: token_ids(size, device, turn),
                {value: Measured(our_step(new_model(section, device, value), device, precision), exact,
                                 TOLERANCE[precision], moved) for value in values()})
