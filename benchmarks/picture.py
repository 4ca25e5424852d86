"""The picture of a written comparison, beside it: time and memory of every side."""

import json
from pathlib import Path
from typing import Any

COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown")
MARKERS = "os^Dv*"


def draw(path: Path) -> Path:
    """Curves against length, or bars where there is one length only."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["seconds"] is not None]
    lengths = sorted({row["length"] for row in rows})
    batches = {row["length"]: row["batch"] for row in rows}
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for axes, key, unit, title, label in zip(panels, ("ns_per_token", "peak_tensor_bytes"), (1e3, 2**20),
                                             ("Time", "Peak memory of tensors"), ("microseconds per token", "MiB"),
                                             strict=True):
        (_curves if len(lengths) > 1 else _bars)(axes, rows, key, unit)
        if len(lengths) > 1:
            axes.set_xticks(lengths, [f"{_short(length)}\nx {batches[length]:,}" for length in lengths])
            axes.minorticks_off()
        axes.set(title=f"{title} (numbers: times that of {rows[0]['side']})")
        (axes.set_ylabel if len(lengths) > 1 else axes.set_xlabel)(label)
        axes.grid(alpha=0.3)
    if len(lengths) > 1:
        panels[0].legend()
    size = result["size"]
    threads = f", threads: {result['machine']['threads']}" if size["device"] == "cpu" else ""
    figure.suptitle(f"{result['subject']}, forward and backward, {size['precision']}, layers x channels: "
                    f"{size['layers']} x {size['width']}, {result['machine']['device']}{threads}")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def _curves(axes: Any, rows: list[dict[str, Any]], key: str, unit: float) -> None:
    from matplotlib.ticker import LogLocator
    base = {row["length"]: row[key] for row in rows if row["side"] == rows[0]["side"]}
    for i, side in enumerate(_sides(rows)):
        found = sorted((row for row in rows if row["side"] == side), key=lambda row: row["length"])
        lengths, values = [row["length"] for row in found], [row[key] / unit for row in found]
        axes.plot(lengths, values, marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], label=side)
        for row, value in zip(found, values, strict=True):
            if i and base.get(row["length"]):
                times = row["ratio"] if key == "ns_per_token" else row[key] / base[row["length"]]
                axes.annotate(f"{times:.2f}", (row["length"], value), textcoords="offset points", ha="center",
                              xytext=(0, 7 if times >= 1 else -14), fontsize=8, color=COLOURS[i % len(COLOURS)])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(y=0.15)
    axes.set_xlabel("tokens of a sequence (log) x sequences")


def _bars(axes: Any, rows: list[dict[str, Any]], key: str, unit: float) -> None:
    values = [row[key] / unit for row in rows]
    bars = axes.barh([row["side"] for row in rows], values, color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))])
    times = [row["ratio"] if key == "ns_per_token" else row[key] / rows[0][key] for row in rows]
    axes.bar_label(bars, [f" {value:,.4g}  ({ratio:.2f})" for value, ratio in zip(values, times, strict=True)])
    axes.margins(x=0.25)
    axes.invert_yaxis()


def _sides(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["side"] for row in rows))


def _short(length: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{letter}"
    return str(length)
