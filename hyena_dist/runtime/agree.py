"""One outcome for all ranks where any of them may fail: a rank that raised alone would leave the others waiting."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from hyena_dist.config.errors import TrainingError, UserError, agreed
from hyena_dist.parallel.groups import Groups

T = TypeVar("T")


def agree(action: Callable[[], T], groups: Groups) -> T:
    """Run an action on this rank; collective, but for the action itself.

    Raises:
        UserError, TrainingError, OSError: on every rank that of the first rank on which the action failed, marked as
            `agreed`.
    """
    failure: UserError | TrainingError | OSError | None = None
    try:
        result = action()
    except (UserError, TrainingError, OSError) as error:
        failure = error
    failures = [failure]
    if groups.world.size > 1:
        failures = [None] * groups.world.size
        dist.all_gather_object(failures, failure, group=groups.world.group)
    for first in failures:
        if first is not None:
            raise agreed(first)
    return result


def agree_where_shared(action: Callable[[], T], groups: Groups) -> T:
    """As `agree`, for an action in which ranks that share sequences wait for each other. Where there are such ranks one
    that fails ends its process at once, which ends the others too: nothing could be agreed on with ranks that wait for
    it inside the action."""
    if groups.context.size == 1:
        return agree(action, groups)
    result = action()
    agree(lambda: None, groups)  # all ranks have finished
    return result


def broadcast(value: T, groups: Groups) -> T:
    """The first rank's value on every rank; collective."""
    values = [value]
    if groups.world.size > 1:
        dist.broadcast_object_list(values, src=0, group=groups.world.group)
    return values[0]
