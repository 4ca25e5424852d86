"""One outcome for all ranks where any of them may fail: a rank that raised alone would leave the others waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from hyena_dist.config.errors import TrainingError, UserError, agreed
from hyena_dist.parallel.groups import Axis, Groups, give_back, gloo_copy

T = TypeVar("T")

WORD_SECONDS = 1.0
"""Between two words of ranks that wait for one another at length."""


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


def agree_at_length(action: Callable[[], T], groups: Groups) -> T:
    """As `agree`, for an action that may take one rank longer than a collective may, while the others have little to
    do. No collective waits for it: a thread of every rank meets those of the others each second until all ranks are
    done, and so the wait ends with an error as soon as a rank does. What the action finds it should write itself: then
    it is kept where another rank is lost meanwhile."""
    if groups.world.size == 1:
        return agree(action, groups)
    word, over = gloo_copy(groups.world), threading.Event()

    def done_by_all() -> T:
        try:
            return action()
        finally:
            over.set()
            met.result()

    try:
        with ThreadPoolExecutor(1) as pool:
            met = pool.submit(_meet_until_over, over, word)
            return agree(done_by_all, groups)
    finally:
        give_back(word)


def _meet_until_over(over: threading.Event, word: Axis) -> None:
    """Return when it is over on all ranks."""
    of_all = torch.tensor(0, device="cpu")
    while not of_all:
        of_all.fill_(over.wait(WORD_SECONDS))
        dist.all_reduce(of_all, dist.ReduceOp.MIN, group=word.group)


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
