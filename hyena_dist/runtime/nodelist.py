"""SLURM's short forms: `node[007-010,12],gpu1` for hosts, `2(x3),1` for how many tasks each has."""

import re

MOST = 100_000
"""More hosts than any cluster has: a longer list is a mistake."""


def expand(nodelist: str) -> list[str]:
    """The hosts of a list, in its order.

    Raises:
        ValueError: it is none.
    """
    found: list[str] = []
    rest = nodelist
    while rest:
        match = re.match(r"(?:[^\[\],\s]+|\[[^\[\]\s]+\])+", rest)
        if match is None:
            raise ValueError(f"{nodelist[:80]!r} is no list of hosts")
        found += _expand(match[0])
        rest = rest[match.end():]
        if rest[:1] == "," and rest[1:]:
            rest = rest[1:]
        elif rest:
            raise ValueError(f"{nodelist[:80]!r} is no list of hosts")
    if not found or len(found) > MOST:
        raise ValueError(f"{nodelist[:80]!r} is no list of 1 to {MOST} hosts")
    return found


def tasks_by_host(counts: str) -> list[int]:
    """How many tasks each host has: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        ValueError: it is none of these forms.
    """
    found: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part, re.ASCII)
        if match is None or int(match[2] or 1) > MOST:
            raise ValueError(f"{counts[:80]!r} are no counts of tasks")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _expand(word: str) -> list[str]:
    """One name, which may have several brackets: all of the last are counted through first."""
    before, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    spans, _, after = rest.partition("]")
    numbers: list[str] = []
    for span in spans.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", span, re.ASCII)
        if match is None:
            raise ValueError(f"{word[:80]!r}: {span[:20]!r} is no number and no range of numbers")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST:
            raise ValueError(f"{word[:80]!r}: the range {span[:20]!r} is empty or too long")
        numbers += [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in _expand(after)] if after else [
        f"{before}{number}" for number in numbers]
