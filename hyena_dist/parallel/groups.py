"""Process groups of a run, made once and passed as arguments; no module fetches a global group.

A rank has a place on three axes: tensor (fastest), context, data. `Groups.single()` is one process without
torch.distributed: every axis has size 1 and no group, and collectives over it do nothing.
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from hyena_dist.config.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One axis of the rank mesh as one rank sees it."""

    group: dist.ProcessGroup | None = None
    """The ranks that differ on this axis only; None when the axis has one rank and nothing was initialised."""
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Groups:
    """Where this rank stands. Sizes multiply to the world size: tensor * context * data."""

    tensor: Axis = field(default_factory=Axis)
    context: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    data_context: Axis = field(default_factory=Axis)
    """data x context: the ranks over which gradients are averaged and ZeRO shards."""
    world: Axis = field(default_factory=Axis)

    @classmethod
    def single(cls) -> "Groups":
        """One process, no torch.distributed."""
        return cls()

    def collection(self) -> ProcessGroupCollection:
        """The model-parallel groups as Megatron's modules take them."""
        collection = ProcessGroupCollection()
        collection.tp, collection.cp = self.tensor.group, self.context.group
        return collection


def init_groups(*, tensor: int = 1, context: int = 1) -> Groups:
    """Split the initialised default process group into Megatron's groups. What is left of the ranks is data parallel.

    Raises:
        ConfigError: tensor * context does not divide the world size.
    """
    world = dist.get_world_size()
    if world % (tensor * context):
        raise ConfigError(f"{world} ranks cannot be split into parallel.tensor={tensor} x parallel.context={context}: "
                         f"start a multiple of {tensor * context} ranks")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)

    def axis(group: dist.ProcessGroup) -> Axis:
        return Axis(group, dist.get_rank(group), dist.get_world_size(group))

    return Groups(
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        context=axis(parallel_state.get_context_parallel_group()),
        data=axis(parallel_state.get_data_parallel_group()),
        data_context=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        world=Axis(dist.group.WORLD, dist.get_rank(), world),
    )
