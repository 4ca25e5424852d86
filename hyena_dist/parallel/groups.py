"""Process groups of a run, made once and passed as arguments; no module fetches a global group.

A rank has a place on three axes: tensor (fastest), context, data. `Groups.single()` is one process without
torch.distributed: every axis has size 1 and no group, and collectives over it do nothing.
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from hyena_dist.config.errors import ConfigError, agreed


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

    def __deepcopy__(self, _memo: object) -> "Axis":
        """Itself: a copy of a module runs over the same ranks."""
        return self

    def __reduce__(self) -> tuple[type["Axis"], tuple[None, int, int]]:
        """Pickled it has no group, which one rank does not need.

        Raises:
            TypeError: several ranks, whose group is of this process alone.
        """
        if self.group is not None and self.size > 1:
            raise TypeError(f"what is split over {self.size} ranks cannot be pickled: save the module's state_dict()")
        return Axis, (None, self.rank, self.size)


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


def tensor_axis(pg_collection: ProcessGroupCollection | None) -> Axis:
    """The tensor axis of Megatron's collection of groups; without one, one rank."""
    return Axis.of(getattr(pg_collection, "tp", None))


def context_axis(pg_collection: ProcessGroupCollection | None) -> Axis:
    """The context axis of Megatron's collection of groups; without one, one rank."""
    return Axis.of(getattr(pg_collection, "cp", None))


def init_groups(*, tensor: int = 1, context: int = 1) -> Groups:
    """Split the ranks of the initialised default process group, whose time-out all groups have. What is left of them
    is data parallel.

    Megatron's order: tensor ranks are neighbours, then context, then data. Its global state is not touched: modules get
    their groups as arguments.

    Raises:
        ConfigError: tensor * context does not divide the world size.
    """
    world = dist.get_world_size()
    if world % (tensor * context):
        _meet()
        raise agreed(ConfigError(f"{world} ranks cannot be split into parallel.tensor={tensor} x parallel.context="
                                 f"{context}: start a multiple of {tensor * context} ranks"))
    ranks = torch.arange(world, device="cpu").view(-1, context, tensor)  # [data, context, tensor]
    groups = Groups(
        tensor=_axis(ranks.reshape(-1, tensor), "tensor"),
        context=_axis(ranks.movedim(1, -1).reshape(-1, context), "context"),
        data=_axis(ranks.movedim(0, -1).flatten(0, 1), "data"),
        data_context=_axis(ranks.movedim(2, 0).flatten(1), "data_context"),
        world=Axis.of(dist.group.WORLD),
    )
    _meet()
    return groups


def _meet(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank has connected the groups that it has made. Gloo lets a rank go on when its own connections
    stand: if it then ends, or ends a group, a rank that is still connecting to others fails, and hides why it ended."""
    if "gloo" in dist.get_backend_config(group):
        dist.all_reduce(torch.zeros(1, device="cpu"), group=group)  # a barrier may ask another backend of the group


def _axis(groups: torch.Tensor, name: str) -> Axis:
    """[groups, ranks of one] -> the group of this rank. The world is not made twice."""
    if len(groups) == 1:
        return Axis.of(dist.group.WORLD)
    group, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=_timeout(), group_desc=name)
    return Axis.of(group)


def _timeout() -> timedelta:
    """Of the default process group. A new group takes torch's own default, half an hour on gloo, unless it is told."""
    assert dist.group.WORLD is not None
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return dist.group.WORLD._get_backend(device).options._timeout


def gloo_copy(axis: Axis) -> Axis:
    """A gloo group of its own over the same ranks: for flags that must not wait for a device, or for a thread, whose
    collectives must not meet those of the main thread. Its time-out is the default process group's. Collective over the
    world; one rank alone needs no group. `give_back` ends it."""
    if axis.size == 1 or axis.group is None:
        return Axis()
    group = dist.new_group(dist.get_process_group_ranks(axis.group), backend="gloo", timeout=_timeout())
    _meet(group)
    return Axis(group, axis.rank, axis.size)


def give_back(copy: Axis) -> None:
    """End the group of a `gloo_copy` that nothing waits in any more: each has a thread that looks at its connections a
    hundred times a second, and a process may train many times."""
    if copy.group is not None and dist.is_initialized():
        dist.destroy_process_group(copy.group)
