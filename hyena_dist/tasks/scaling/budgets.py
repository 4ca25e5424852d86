"""Pictures of what a budget buys: best size and tokens beside published ones, and parabolas of runs of one budget."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.tasks.scaling.analysis import Analysis
from hyena_dist.tasks.scaling.fit import Array
from hyena_dist.tasks.scaling.pictures import LABELS, LAW, RUN, colours, figure, log_x
from hyena_dist.tasks.scaling.points import ANCHORS

PUBLISHED = {"Hyena": ("s", "#b07aa1"), "StripedHyena": ("^", "#f28e2b"), "Transformer++": ("v", "#76787a")}
"""Architectures of Evo 1 whose optima on DNA are drawn."""


def evo_optima() -> dict[str, dict[str, tuple[Array, Array]]]:
    """Of each architecture its best params and tokens on DNA at 8k context: (operations, values)."""
    with (ANCHORS / "evo1_optima.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, tuple[Array, Array]]] = {}
    for row in rows:
        flops, values = found.setdefault(row["model"], {}).get(row["variable"], (np.empty(0), np.empty(0)))
        found[row["model"]][row["variable"]] = (np.append(flops, float(row["flops"])),
                                                np.append(values, float(row["value"])))
    return found


def chinchilla_optima() -> dict[str, tuple[Array, Array]]:
    """Chinchilla's run of the lowest loss at each budget, on text: (operations, values) of params and tokens."""
    with (ANCHORS / "chinchilla_isoflops.csv").open(encoding="utf-8") as file:
        rows = [{key: float(row[key]) for key in ("budget", "params", "tokens", "loss")}
                for row in csv.DictReader(file)]
    best = {budget: min((row for row in rows if row["budget"] == budget), key=lambda row: row["loss"])
            for budget in sorted({row["budget"] for row in rows})}
    return {key: (np.array(list(best)), np.array([row[key] for row in best.values()])) for key in ("params", "tokens")}


def draw_optimum(found: Analysis, path: Path) -> bool:
    """Best weights and tokens by budget, beside published ones."""
    if found.allocation is None:
        return False
    curve = found.allocation.curve
    identified = curve[0].size_interval.identified
    flops, measured = np.array([row.flops for row in curve]), np.array([row.beyond <= 1 for row in curve])
    with figure(path, 2, width=5.6, height=4.6) as (drawn, all_axes):
        for axes, key, name in zip(all_axes, ("size", "tokens"), ("params", "tokens"), strict=True):
            values = np.array([getattr(row, key) for row in curve])
            for where, style, label in ((measured, "-", "the law"), (~measured, "--", "the same, extrapolated")):
                axes.plot(flops[where], values[where], style, color=LAW, linewidth=1.8, zorder=4, label=label)
            if identified:
                intervals = [getattr(row, f"{key}_interval") for row in curve]
                axes.fill_between(flops, [i.low for i in intervals], [i.high for i in intervals], color=LAW, alpha=0.18,
                                  linewidth=0, label="95 % interval", zorder=2)
            inside = [parabola for parabola in found.parabolas if parabola.size]
            axes.plot([parabola.flops for parabola in inside], [getattr(parabola, key) for parabola in inside], "o",
                      color=RUN,
                      markerfacecolor="white", markersize=6, zorder=5,
                      label="lowest points of parabolas (biased)" if inside else None)
            _draw_published(axes, name)
            log_x(axes, "C")
            axes.set_yscale("log")
            axes.set_ylabel(f"best {LABELS['N' if key == 'size' else 'D']}")
        all_axes[0].legend(fontsize=7.5, loc="upper left")
        drawn.suptitle("Best size and tokens for a budget" + ("" if identified else ": not identified by these runs"))
    return True


def _draw_published(axes: Any, name: str) -> None:
    for model, (marker, colour) in PUBLISHED.items():
        axes.plot(*evo_optima()[model][name], marker, color=colour, markersize=5.5, alpha=0.9, zorder=3,
                  label=f"Evo 1, DNA at 8k: {model}")
    axes.plot(*chinchilla_optima()[name], "x", color="black", markersize=5, alpha=0.7, zorder=3,
              label="Chinchilla, text: best run")


def draw_isoflops(found: Analysis, path: Path) -> bool:
    """Losses of the runs of each budget with a parabola through them."""
    curves = found.parabolas
    if not curves:
        return False
    norm, cmap = colours(np.array([curve.flops for curve in curves] if len(curves) > 1 else [curves[0].flops / 2,
                                                                                             curves[0].flops * 2]))
    with figure(path, width=7.6, height=5.0) as (_, (axes,)):
        highest = max(curve.losses.max() for curve in curves)
        for curve in curves:
            colour = cmap(0.92 * norm(curve.flops))
            line = np.geomspace(curve.sizes[0], curve.sizes[-1], 100)
            values = np.polyval(curve.coefficients, np.log(line))
            axes.plot(line, np.where(values <= highest * 1.05, values, np.nan), color=colour, linewidth=1.1, alpha=0.8)
            axes.plot(curve.sizes, curve.losses, "o", color=colour, markersize=4.5, markeredgecolor="white",
                      markeredgewidth=0.4, label=f"{curve.flops:.2g}" + ("" if curve.size else " (not bracketed)"))
            if curve.size is not None:
                axes.plot(curve.size, np.polyval(curve.coefficients, np.log(curve.size)), "*", color=LAW,
                          markeredgecolor="white", markersize=12, zorder=5)
        axes.plot([], [], "*", color=LAW, markersize=10, linestyle="none", label="lowest point")
        log_x(axes, "N")
        axes.set_ylabel("validation loss [nats]")
        axes.legend(title="operations C [FLOPs]", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_title("Runs of one budget and parabolas through them. BIASED: a picture, not the fit")
    return True
