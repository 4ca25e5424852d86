"""The parts of a GPU check in order of importance, what each asks, and its seconds; which of them fit into a time."""

from collections.abc import Sequence
from dataclasses import dataclass

TOTAL = 540
"""Seconds of a whole check."""
SPARE = 8
"""Of them, to start, to stop what does not end, and to write the results."""
CORES_TOGETHER = 12
"""From this many cores on, parts that time nothing run beside each other."""


@dataclass(frozen=True)
class Part:
    """One part: a module of this package by its name, run in a process of its own."""

    name: str
    seconds: int
    """At most; beside others as long as the longest of them."""
    asks: str
    alone: bool = True
    """Whether it times the device: then nothing runs beside it."""
    lines: int = 8
    """Of the summary, at most; what failed is shown whatever there is."""
    default: bool = True


PARTS = (
    Part("facts", 40, "ceilings of copy and product, cost of a launch, imports, one NCCL rank"),
    Part("tests", 166, "tests marked gpu: CUDA against the CPU, engines, NCCL ranks, memory, waits", alone=False),
    Part("runs", 75, "20 steps of the quickstart by engine and precision, a crossing", alone=False, lines=10),
    Part("nccl", 45, "pretraining on two NCCL ranks that share one GPU, and on one rank per GPU", alone=False),
    Part("million", 65, "8x256 at 1,048,576 tokens in bf16: time, memory by formula, waits, kernels", lines=14),
    Part("transformer", 46, "a step of the same-sized Transformer over ours by length, its fit to 1,048,576"),
    Part("bench", 70, "training step, mixer and long convolution against plain code, by length", lines=14),
    Part("engines", 25, "a small step through every engine: time, peak memory, where the host waits"),
    Part("sizes", 60, "steps of other sizes: time, launches, share of the time in which the GPU works", lines=24,
         default=False),
    Part("kernels", 170, "Triton's kernels: right, the same twice, their times, of other launch options too", lines=40,
         default=False),
    Part("around", 120, "Triton's kernels of norm, GELU and filter: right, the same twice, their times, a step's",
         lines=24, default=False),
    Part("across", 45, "Triton's kernels over two context ranks that share the GPU: right", default=False),
)


def chosen(names: Sequence[str] | None) -> list[Part]:
    """The parts of these names, in their order of importance; None: the default ones.

    Raises:
        ValueError: a name that there is not.
    """
    unknown = sorted(set(names or ()) - {part.name for part in PARTS})
    if unknown:
        raise ValueError(f"no part {unknown[0]!r}: choose of {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if (part.default if names is None else part.name in names)]


def stages(parts: Sequence[Part], cores: int) -> list[list[Part]]:
    """What runs after what; the parts of one stage run beside each other."""
    found: list[list[Part]] = []
    for part in parts:
        beside = found and not part.alone and not found[-1][0].alone and cores >= CORES_TOGETHER
        if beside:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def seconds(stage: Sequence[Part]) -> int:
    """That a stage takes at most."""
    return max(part.seconds for part in stage)


def fitting(planned: Sequence[list[Part]], total: float) -> list[list[Part]]:
    """The stages for which there is at least half of their time, the most important ones first. The others are left
    out: with less than half of what they need, none would say anything."""
    kept: list[list[Part]] = []
    for stage in planned:
        if sum(map(seconds, [*kept, stage])) / 2 <= total - SPARE:
            kept.append(stage)
    return kept


def share(stage: Sequence[Part], later: Sequence[Sequence[Part]], left: float) -> float:
    """The part of its seconds that a stage gets when `left` are left for it and those after it, at most 1."""
    return max(0.0, min(1.0, (left - SPARE) / sum(map(seconds, [stage, *later]))))
