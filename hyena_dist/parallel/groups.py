"""Process groups of a run, made once and passed as arguments; no module fetches a global group.

A rank has a place on three axes: tensor (fastest), context, data. `Groups.single()` is one process without
torch.distributed: every axis has size 1 and no group, and collectives over it do nothing.
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.device_mesh import init_device_mesh

from hyena_dist.config.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One axis of the rank mesh as one rank sees it."""

    group: dist.ProcessGroup | None = None
    """The ranks that differ on this axis only; None when the axis has one rank and nothing was initialised."""
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "Axis":
        """The axis of a process group that this rank is in; None is one rank."""
        return cls() if group is None else cls(group, dist.get_rank(group), dist.get_world_size(group))


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
    """Split the ranks of the initialised default process group. What is left of them is data parallel.

    Megatron's order: tensor ranks are neighbours, then context, then data. Its global state is not touched: modules get
    their groups as arguments.

    Raises:
        ConfigError: tensor * context does not divide the world size.
    """
    world = dist.get_world_size()
    if world % (tensor * context):
        raise ConfigError(f"{world} ranks cannot be split into parallel.tensor={tensor} x parallel.context={context}: "
                          f"start a multiple of {tensor * context} ranks")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (world // (tensor * context), context, tensor),
                            mesh_dim_names=("data", "context", "tensor"))
    return Groups(
        tensor=Axis.of(mesh.get_group("tensor")),
        context=Axis.of(mesh.get_group("context")),
        data=Axis.of(mesh.get_group("data")),
        data_context=Axis.of(mesh["data", "context"]._flatten().get_group()),
        world=Axis.of(dist.group.WORLD),
    )


def gloo_copy(axis: Axis) -> Axis:
    """A gloo group of its own over the same ranks: for flags that must not wait for a device, or for a thread, whose
    collectives must not meet those of the main thread. Collective over the world; one rank alone needs no group."""
    if axis.size == 1 or axis.group is None:
        return Axis()
    return Axis(dist.new_group(dist.get_process_group_ranks(axis.group), backend="gloo"), axis.rank, axis.size)
