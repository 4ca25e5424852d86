"""Long readings in numbered pieces: by any number of ranks, killed and resumed at will, with the same result."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree_where_shared, broadcast
from hyena_dist.tasks.parts import Parts, names
from hyena_dist.tasks.score.tables import bar


def read_pieces(parts: Parts, facts: Mapping[str, Any], count: int, read: Callable[[int], Mapping[str, np.ndarray]],
                groups: Groups, what: str) -> None:
    """Begin the parts, or go on with them, and read the pieces 0 to count - 1 of which there is no part yet. The data
    ranks do them in turn; ranks that share sequences read each together, and the first of them writes it. Collective:
    when it returns, all parts are there.

    Args:
        facts: that decide what is in the parts.
        read: what is in a piece, by its number.
        what: the pieces are, for the bar.

    Raises:
        ConfigError: the parts that are there are those of other facts.
    """
    parts.begin(facts, groups)
    there = broadcast(frozenset(number for number in range(count) if parts.load(names([number])) is not None)
                      if groups.world.rank == 0 else frozenset(), groups)

    def read_mine() -> None:
        with bar(what, groups) as shown:
            task = shown.add_task("", total=count)
            for number in range(count):
                if number % groups.data.size == groups.data.rank and number not in there:
                    arrays = read(number)
                    if groups.context.rank == 0:
                        parts.save(names([number]), **arrays)
                shown.advance(task)
    agree_where_shared(read_mine, groups)


def piece(parts: Parts, number: int) -> Mapping[str, np.ndarray]:
    """What was read of a piece.

    Raises:
        ConfigError: it is not there.
    """
    return parts.need(names([number]))
