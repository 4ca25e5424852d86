"""Training step, mixer and long convolution against plain code, as launchers/bench.py, one length after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.task import Task, device

LEAST_SECONDS = 10.0


@dataclass(frozen=True)
class Comparison:
    """What is compared, at sizes that fill the device."""

    subject: str
    width: int
    layers: int
    tokens: int
    precision: str
    lengths: tuple[int, ...]


LENGTHS = (1024, 32768, 1 << 20, 8192, 131072)
"""The ends and the middle first: the time may not do for all."""
COMPARISONS = (Comparison("step", 256, 2, 131072, "bf16", LENGTHS),
               Comparison("mixer", 256, 1, 262144, "bf16", LENGTHS),
               Comparison("conv", 128, 1, 1 << 20, "fp32", LENGTHS))
TINY = (Comparison("step", 16, 1, 512, "bf16", (256,)), Comparison("conv", 4, 1, 512, "fp32", (256,)))


def run(task: Task) -> None:
    chosen = TINY if task.tiny else COMPARISONS
    for index in range(max(len(c.lengths) for c in chosen)):  # every comparison at a length, then the next length
        for comparison in chosen:
            label = f"{comparison.subject} {comparison.layers}x{comparison.width} at {comparison.lengths[index]:,}"
            if task.left() < LEAST_SECONDS:
                task.note(f"{label}: no time left")
                return
            task.attempt(label, partial(_one, task, comparison, comparison.lengths[index], label))


def _one(task: Task, comparison: Comparison, length: int, label: str) -> None:
    from benchmarks import subjects
    from benchmarks.models import Size
    size = Size(length, comparison.width, max(1, comparison.tokens // length), comparison.layers)
    result = subjects.run(subjects.Plan(comparison.subject, [size], device(), comparison.precision, rounds=3))
    ours = next(row for row in result["rows"] if row["side"] == "ours")
    task.note(f"{label} x {size.batch}, {comparison.precision}: {_side(ours)}"
              + "".join(f"; {_side(row, ours)}" for row in result["rows"] if row is not ours),
              subject=comparison.subject, result=result)


def _side(row: Mapping[str, Any], ours: Mapping[str, Any] | None = None) -> str:
    if not row["seconds"]:
        return f"{row['side']} {row['note'].partition(':')[0]}"
    if ours is None or not ours["seconds"]:
        return f"{row['side']} {row['seconds'] * 1e3:,.2f} ms, {row['copy_share']:.0%} of copy speed"
    return (f"{row['side']} {row['ratio']:.2f} of its time, "
            f"{row['peak_tensor_bytes'] / max(1, ours['peak_tensor_bytes']):.2f} of its memory")
