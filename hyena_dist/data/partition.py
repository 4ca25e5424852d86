"""How labelled sequences are parted: a random part for validation, and what stands in two parts that should be
apart."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from hyena_dist.data.tables import Example


def draw(examples: Sequence[Example], fraction: float, seed: int, *, same: Callable[[Example], bytes],
         classes: Callable[[Example], Collection[str]]) -> tuple[list[Example], list[Example]]:
    """The sequences that are left to train on, and a random part for validation.

    Copies of one sequence stay together, so that none is on both sides. Of each class at least one sequence is left,
    with its copies: a class that is never trained on could not be validated.

    Args:
        fraction: of the sequences, which the part has at least unless too few can be spared.
        same: a key that copies share.
        classes: those of a sequence; none where labels are numbers.
    """
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(same(example), []).append(number)
    members = list(groups.values())
    # Sequences without a class count as one class of their own: one of them is left, too.
    of_group = [{name for number in group for name in classes(examples[number]) or ("",)} for group in members]
    left = Counter(name for names in of_group for name in names)
    wanted, drawn = max(1, round(fraction * len(examples))), set[int]()
    for group in np.random.default_rng([seed, 0x7661]).permutation(len(members)):
        if len(drawn) >= wanted:
            break
        if any(left[name] == 1 for name in of_group[group]):
            continue
        left.subtract(of_group[group])
        drawn.update(members[group])
    return ([example for number, example in enumerate(examples) if number not in drawn],
            [example for number, example in enumerate(examples) if number in drawn])
