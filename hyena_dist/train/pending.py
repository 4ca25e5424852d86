"""What the loop keeps of a step until its numbers are read."""

from dataclasses import dataclass

from torch import Tensor

from hyena_dist.config.warmup import Stage
from hyena_dist.engine.protocol import StepResult
from hyena_dist.train.laps import Laps


@dataclass(frozen=True)
class Pending:
    """An optimizer step whose numbers are still on their way from the device."""

    step: int
    stage: Stage
    lr: float
    scored: Tensor
    """Bases that the loss is the mean of, over all ranks."""
    loss: Tensor
    result: StepResult
    loading: float
    """Seconds in which the host waited for the batches."""
    laps: Laps
    """Of the device: the start of the step, of its first forward pass, the end of that, and of the step."""
