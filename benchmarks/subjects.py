"""The comparisons by name, and the report of a run of one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import lengths, operators, recompute, step
from benchmarks.compare import Case, Row, compare, estimated_peaks, growth
from benchmarks.models import Size
from hyena_dist.costs.utilisation import copy_bandwidth

CASES: dict[str, Callable[[Size, torch.device, str], Case]] = {
    "conv": operators.conv, "filter": operators.implicit_filter, "mixer": operators.mixer, "step": step.step,
    "memory": recompute.recompute}


@dataclass(frozen=True)
class Plan:
    """What to compare."""

    subject: str
    sizes: Sequence[Size]
    device: torch.device
    precision: str = "fp32"
    rounds: int = 5

    def case(self, size: Size) -> Case:
        return CASES[self.subject](size, self.device, self.precision)


def run(plan: Plan) -> dict[str, Any]:
    """Measure every size. Returns what a result file holds besides the machine.

    Raises:
        WrongValues: a side computes something else; nothing is to be reported.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every side
    bandwidth = copy_bandwidth(plan.device)
    rows: list[Row] = []
    for size in plan.sizes:
        rows += compare(plan.case(size), rounds=plan.rounds, device=plan.device, copy_bytes_per_second=bandwidth)
    grown = {side: growth(rows, side) for side in dict.fromkeys(row.side for row in rows)}
    first = plan.sizes[0]
    cost = lengths.summary([asdict(row) for row in rows], first) if plan.subject == "step" else None
    return {"subject": plan.subject,
            "size": {"width": first.width, "layers": first.layers,
                     "precision": plan.precision, "device": plan.device.type, "rounds": plan.rounds},
            "copy_bytes_per_second": bandwidth, "growth": {side: g for side, g in grown.items() if g is not None},
            "rows": [asdict(row) for row in rows], **({"cost": cost} if cost else {})}


def estimate(plan: Plan) -> list[dict[str, str]]:
    """The rows of a dry run: every size and the estimated peak tensor memory of its sides."""
    rows = []
    for size in plan.sizes:
        peaks = estimated_peaks(lambda length, size=size: plan.case(Size(length, size.width, size.batch, size.layers)),
                                size.length, plan.device)
        rows.append({"length": f"{size.length:,}", "batch": f"{size.batch:,}", "width": str(size.width),
                     "layers": str(size.layers), **{f"{name}, MiB": f"{peak / 2**20:,.0f}"
                                                    for name, peak in peaks.items()}})
    return rows


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row as the terminal shows it."""
    def text(key: str, form: str, unit: float = 1) -> str:
        return "" if row[key] is None else format(row[key] / unit, form)

    return {
        "length": f"{row['length']:,}", "batch": f"{row['batch']:,}", "side": row["side"],
        "ms": text("seconds", ",.2f", 1e-3), "ratio": text("ratio", ".3f"),
        "CPU ms": text("cpu_seconds", ",.2f", 1e-3), "CPU ratio": text("cpu_ratio", ".3f"),
        "us/token": text("ns_per_token", ",.3f", 1e3), "peak MiB": text("peak_tensor_bytes", ",.1f", 2**20),
        "least MiB moved": text("formula_bytes", ",.1f", 2**20), "of copy speed": text("copy_share", ".1%"),
        "value error": text("value_error", ".1e"), "gradient error": text("gradient_error", ".1e"),
    }


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is said of sides, and at which lengths."""
    lengths: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            lengths.setdefault(f"{row['side']}: {row['note']}", []).append(f"{row['length']:,}")
    return [f"{note} (at {', '.join(of)})" for note, of in lengths.items()]
