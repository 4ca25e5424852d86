"""What a token costs by the length of its sequence, Hyena beside attention: exact operations at any length, and a curve
through the measured times that says where the two cross and what a million tokens would take. Times are of the
processor, where they are known: other programs on the machine do not count in them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.models import Size
from benchmarks.step import TRANSFORMER
from hyena_dist.costs.flops import training_flops

LONG = 2**20
"""The length that the curves are asked about."""
SHAPES = {"ours": np.log2, TRANSFORMER: np.asarray}
"""How a side's time per token grows beyond a constant: Hyena's FFTs with log L, attention's products with L."""
PATTERNS = {"ours": "H", TRANSFORMER: "A"}


@dataclass(frozen=True)
class Curve:
    """Nanoseconds a token: constant + slope log2 L, or + slope L for attention."""

    side: str
    constant: float
    slope: float
    shortest: int
    longest: int
    """Of the lengths that were measured."""
    worst: float
    """The largest relative error of the curve over these."""

    def __call__(self, length: Any) -> Any:
        return self.constant + self.slope * SHAPES[self.side](np.asarray(length, dtype=float))


def fit(side: str, measured: Mapping[int, float]) -> Curve:
    """The curve with the least relative errors, none of its numbers negative.

    Args:
        measured: nanoseconds a token by length, of at least two lengths.
    """
    lengths = np.array(sorted(measured), dtype=float)
    times = np.array([measured[int(length)] for length in lengths])
    matrix = np.column_stack([np.ones(len(lengths)), SHAPES[side](lengths)]) / times[:, None]
    found, _ = nnls(matrix, np.ones(len(lengths)))
    return Curve(side, *map(float, found), int(lengths[0]), int(lengths[-1]), float(np.abs(matrix @ found - 1).max()))


def operations(side: str, size: Size, length: int) -> float:
    """Exact training FLOPs a token of one sequence of that length."""
    section = Size(length, size.width, 1, size.layers).section(PATTERNS[side])
    return training_flops(section, length) / length


def crossing(size: Size) -> int | None:
    """The shortest length from which on attention takes more operations up to `LONG`, where it takes ever more beside
    Hyena; None: it does not at that one."""
    def more(length: int) -> bool:
        return operations(TRANSFORMER, size, length) > operations("ours", size, length)

    low, high = 2, LONG
    if not more(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if more(middle) else (middle + 1, high)
    return low


def slower_from(measured: Mapping[str, Mapping[int, float]]) -> tuple[int | None, int | None]:
    """(the last measured length at which attention is not slower, the first of those from which on it is)."""
    both = sorted(measured["ours"].keys() & measured[TRANSFORMER].keys())
    equal = [length for length in both if measured[TRANSFORMER][length] <= measured["ours"][length]]
    longer = [length for length in both if not equal or length > equal[-1]]
    return (equal[-1] if equal else None), (longer[0] if longer else None)


def nanoseconds(row: Mapping[str, Any]) -> float:
    """A token's time in a row of a comparison."""
    return float(1e9 * (row["cpu_seconds"] or row["seconds"]) / (row["length"] * row["batch"]))


def summary(rows: Sequence[Mapping[str, Any]], size: Size) -> dict[str, Any] | None:
    """Curves, crossings and the cost of `LONG` tokens of the rows of a comparison of steps; None where one of the two
    sides was measured at fewer than two lengths."""
    measured = {side: {row["length"]: nanoseconds(row) for row in rows if row["side"] == side and row["seconds"]}
                for side in SHAPES}
    if min(map(len, measured.values())) < 2:
        return None
    curves = {side: fit(side, times) for side, times in measured.items()}
    hyena, attention = (curves[side] for side in SHAPES)
    flops = {side: operations(side, size, LONG) for side in SHAPES}
    return {"curves": [asdict(curve) for curve in curves.values()],
            "crossing of operations": crossing(size), "attention is slower": slower_from(measured),
            "length": LONG, "operations a token": flops,
            "times the operations": flops[TRANSFORMER] / flops["ours"],
            "nanoseconds a token, extrapolated": {side: float(curve(LONG)) for side, curve in curves.items()},
            "times the time, extrapolated": float(attention(LONG) / hyena(LONG))}


def said(found: Mapping[str, Any]) -> list[str]:
    """The summary in lines."""
    last, first = found["attention is slower"]
    slower = (f"from {first:,} tokens on" + ("" if last is None else f", and not at {last:,}") if first else
              "at no length that was measured")
    crossed = found["crossing of operations"]
    more = f"from {crossed:,} tokens on" if crossed else "at no length up to a million tokens"
    far = {curve["side"]: found["length"] / curve["longest"] for curve in found["curves"]}
    lines = [f"attention takes more operations {more} (exact), and more time {slower} (measured)",
             f"at {found['length']:,} tokens: {found['times the operations']:,.1f} times the operations (exact), "
             f"{found['times the time, extrapolated']:,.0f} times the time (EXTRAPOLATED: "
             f"{far[TRANSFORMER]:,.0f} times the longest sequence that attention was measured at, "
             f"{far['ours']:,.0f} times that of Hyena)"]
    return lines + [f"{curve['side']}: {curve['constant']:,.0f} + {curve['slope']:,.4g} "
                    f"{'L' if curve['side'] == TRANSFORMER else 'log2 L'} ns a token, within {curve['worst']:.0%} of "
                    "what was measured" for curve in found["curves"]]


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Measured times with their curves up to `LONG`, and exact operations, against length."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found, size = result["cost"], Size(2, result["size"]["width"], 1, result["size"]["layers"])
    names = {"ours": "Hyena", TRANSFORMER: "attention"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (side, name), colour, curve in zip(names.items(), ("tab:blue", "tab:red"), found["curves"], strict=True):
        rows = [row for row in result["rows"] if row["side"] == side and row["seconds"]]
        shape = Curve(**curve)
        inside, beyond = np.geomspace(shape.shortest, shape.longest), np.geomspace(shape.longest, LONG)
        left.plot([row["length"] for row in rows], [nanoseconds(row) / 1e3 for row in rows], "o", color=colour,
                  label=f"{name}, measured")
        left.plot(inside, shape(inside) / 1e3, color=colour, label=f"{name}, curve")
        left.plot(beyond, shape(beyond) / 1e3, "--", color=colour, label=f"{name}, extrapolated")
        lengths = [2**power for power in range(6, 21)]
        right.plot(lengths, [operations(side, size, length) for length in lengths], color=colour, label=name)
    last, first = found["attention is slower"]
    if last and first:
        left.axvspan(last, first, color="grey", alpha=0.3, label=f"they cross between {last:,} and {first:,} tokens")
    if crossed := found["crossing of operations"]:
        right.axvline(crossed, color="grey", linestyle=":", label=f"they cross at {crossed:,} tokens")
    for axes, title, label in ((left, "Time", "microseconds a token"),
                               (right, "Operations, exact", "training FLOPs a token")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel=label, title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"A training step's cost of a token, {size.layers} layers of {size.width} channels, "
                    f"{result['machine']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
