"""Which engine holds gradients and optimizer state, and how it shards them."""

from dataclasses import dataclass, field
from typing import Any

from hyena_dist.config.sections.ranges import one_of


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """Who owns gradients, optimizer state and their sharding."""

    name: str = "deepspeed"
    """deepspeed or fsdp."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3; FSDP always shards weights, gradients and optimizer state, as stage 3 does."""
    offload: str = "none"
    """What lives in the host's memory instead of the device's: none, optimizer (its state and step), or parameters
    (the weights too)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed through to DeepSpeed's configuration: its keys that tune or report (buckets, comms logger), as
    `engine/deepspeed_keys.py` lists them; others are refused."""

    def __post_init__(self) -> None:
        one_of("engine", "name", self.name, ("deepspeed", "fsdp"))
        one_of("engine", "offload", self.offload, ("none", "optimizer", "parameters"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
