"""The pictures of a scaling report. Points are runs, lines are the law, bands are 95 % intervals."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.scaling.analysis import Analysis, Fitted
from hyena_dist.tasks.scaling.fit import BOX, Array, profile, profile_line, threshold
from hyena_dist.tasks.scaling.points import Point, lengths_at_fixed_compute
from hyena_dist.train.wording import amount

LABELS = {"N": "weights N", "D": "training tokens D", "T": "window length T [tokens]",
          "C": "operations C [FLOPs]"}
RUN, LAW, OTHER = "#20639b", "#c8453b", "#4f8f5b"
CLOUD = 32
"""Steps along each side of a profile's map."""
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
              "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "axes.titlelocation": "left",
              "axes.titlesize": 10, "figure.constrained_layout.use": True}


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, *, width: float = 5.0, height: float = 3.9) -> Iterator[Any]:
    """A figure and its axes [rows * columns], written to `path` at the end."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        try:
            yield drawn, list(axes.flat)
            write_whole(path, lambda aside: drawn.savefig(aside, dpi=110))
        finally:
            plt.close(drawn)


def draw_all(found: Analysis, out: Path) -> list[Path]:
    """Every picture that there are points for.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a picture cannot be written.
    """
    from hyena_dist.tasks.scaling.budgets import draw_isoflops, draw_optimum
    from hyena_dist.tasks.scaling.shapes import draw_depth, draw_metric

    pictures: list[tuple[str, Callable[[Analysis, Path], bool]]] = [
        ("loss.png", draw_loss), ("optimum.png", draw_optimum), ("isoflops.png", draw_isoflops),
        ("profile.png", draw_profile), ("residuals.png", draw_residuals), ("depth.png", draw_depth),
        ("metric.png", draw_metric)]
    written = []
    for name, draw in pictures:
        path = out / name
        if draw(found, path):
            written.append(path)
        else:
            path.unlink(missing_ok=True)  # of an earlier report on other runs
    return written


def colours(values: Array) -> tuple[Any, Any]:
    """(a logarithmic scale of colours over positive values, its map)."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    low, high = float(values.min()), float(values.max())
    return LogNorm(low / 1.001, high * 1.001), colormaps["viridis"]


def coloured(axes: Any, x: Any, y: Any, axis: str, values: Array) -> tuple[Any, Any]:
    """Draw points in the colours of a quantity, by its name, beside its colour bar, or beside its value where that is
    the same of all; returns the scale and the map of the colours."""
    norm, cmap = colours(values)
    drawn = axes.scatter(x, y, c=values, norm=norm, cmap=cmap, s=22, edgecolor="white", linewidth=0.4, zorder=3)
    if values.min() < values.max():
        axes.figure.colorbar(drawn, ax=axes, label=LABELS[axis], pad=0.01)
    else:
        axes.annotate(f"{LABELS[axis]}: {amount(float(values[0]))} in every run", (1.01, 0.5),
                      xycoords="axes fraction", rotation=90, va="center")
    return norm, cmap


def log_x(axes: Any, axis: str) -> None:
    """A logarithmic scale of a quantity, by its name."""
    axes.set_xscale("log", base=2 if axis == "T" else 10)
    if axis == "T":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(LABELS[axis])


def draw_loss(found: Analysis, path: Path) -> bool:
    """The loss against N, D, C and T."""
    points = found.points
    lengths = len({point.seq_len for point in points if point.seq_len}) > 1
    costs = [point for point in points if point.flops or point.budget]
    panels = ["N", "D", *(["C"] if costs else []), *(["T"] if lengths else [])]
    with figure(path, min(len(panels), 2) if len(panels) != 3 else 3, 2 if len(panels) == 4 else 1,
                height=4.1) as (drawn, all_axes):
        for axes, panel in zip(all_axes, panels, strict=True):
            if panel == "C":
                _against_cost(axes, found, costs)
            elif panel == "T":
                _against_length(axes, points)
            else:
                _against(axes, found, panel)
            axes.set_ylabel("validation loss [nats]")
        title, main = "Loss of every run", found.main
        if main is not None and not {"N", "D"}.isdisjoint(main.law.axes):
            title += (", and the law through them" if main.trust.identified else
                      ", and a law that these runs do not identify")
        drawn.suptitle(title)
    return True


def _against(axes: Any, found: Analysis, panel: str) -> None:
    """The loss against N, coloured by D, or the other way round, with the law at some values of the other."""
    values = {"N": np.array([point.params for point in found.points]),
              "D": np.array([point.tokens for point in found.points])}
    other = "D" if panel == "N" else "N"
    loss = [point.loss for point in found.points]
    norm, cmap = coloured(axes, values[panel], loss, other, values[other])
    log_x(axes, panel)
    main = found.main
    if main is not None and panel in main.law.axes:
        line = np.geomspace(values[panel].min() / 1.3, values[panel].max() * 1.3, 100)
        top = max(loss) + 0.06 * (max(loss) - min(loss))
        for at in np.unique(np.quantile(values[other], [0.0, 0.25, 0.5, 0.75, 1.0], method="nearest")):
            of = {panel: line, other: np.full(100, at)}
            curve = main.law(_with_length(main, np.column_stack([of[axis] for axis in main.law.axes if axis != "T"])))
            axes.plot(line, np.where(curve <= top, curve, np.nan), color=cmap(norm(at)), linewidth=1.0, alpha=0.8)
        if main.trust.floor.identified:
            axes.axhline(main.law.floor, color="grey", linestyle=":", linewidth=1.0)
            axes.annotate(f"floor E = {main.law.floor:.3f}", (0.99, main.law.floor),
                          xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="dimgrey")
    axes.set_title(f"against {LABELS[panel]}")


def _with_length(main: Fitted, x: Array) -> Array:
    """Quantities [n, k] with the middle length of the runs beside them, where the law has a term in it."""
    if "T" not in main.law.axes:
        return x
    return np.column_stack([x, np.full(len(x), np.median(main.x[:, -1]))])


def _against_cost(axes: Any, found: Analysis, points: Sequence[Point]) -> None:
    cost = np.array([point.flops or point.budget or 0.0 for point in points])
    size = np.array([point.params for point in points])
    coloured(axes, cost, [point.loss for point in points], "N", size)
    if found.allocation is not None:
        for beyond, style, label in ((False, "-", "the best size for each budget, by the law"),
                                     (True, "--", "the same, extrapolated")):
            rows = [row for row in found.allocation.curve if (row.beyond >= 1) == beyond]
            axes.plot([row.flops for row in rows], [row.loss for row in rows], style, color=LAW, linewidth=1.4,
                      label=label)
        axes.legend(fontsize=8, frameon=True, framealpha=0.6)
    log_x(axes, "C")
    axes.set_title("against operations")


def _against_length(axes: Any, points: Sequence[Point]) -> None:
    """Lines join the runs of about the same operations and size: what a length costs at fixed compute."""
    known = [point for point in points if point.seq_len]
    size = np.array([point.params for point in known])
    norm, cmap = coloured(axes, [point.seq_len or 0 for point in known], [point.loss for point in known], "N", size)
    for _, of_size, losses in lengths_at_fixed_compute(known):
        axes.plot(sorted(losses), [losses[length] for length in sorted(losses)], linewidth=0.9, alpha=0.7,
                  color=cmap(norm(of_size)))
    log_x(axes, "T")
    axes.set_title("against length; lines join one size at one budget")


def draw_residuals(found: Analysis, path: Path) -> bool:
    """How far each run is from the law, against N, D and the loss itself."""
    main = found.main
    if main is None:
        return False
    residuals = 100 * main.residuals
    spread = float(np.sqrt((residuals**2).sum() / max(len(residuals) - main.law.parameters, 1)))
    reach = max(1.15 * float(np.abs(residuals).max()), 2.3 * spread, 1e-6)
    with figure(path, len(main.law.axes) + 1, width=4.0, height=3.4) as (drawn, all_axes):
        for j, axes in enumerate(all_axes):
            on_axis = j < len(main.law.axes)
            axes.axhspan(-2 * spread, 2 * spread, color="grey", alpha=0.12, linewidth=0)
            axes.axhline(0, color=LAW, linewidth=1.2)
            axes.scatter(main.x[:, j] if on_axis else main.law(main.x), residuals, s=20, color=RUN, edgecolor="white",
                         linewidth=0.4, zorder=3)
            axes.set_ylim(-reach, reach)
            if on_axis:
                log_x(axes, main.law.axes[j])
            else:
                axes.set_xlabel("loss by the law [nats]")
        all_axes[0].set_ylabel("measured loss beyond the law's [%]")
        drawn.suptitle(f"Residuals, {main.name}: no pattern should be left (grey: twice their spread of "
                       f"{spread:.2g} %)")
    return True


def draw_profile(found: Analysis, path: Path) -> bool:
    """The error over the first two exponents: a closed valley is a law, an open one is not identified."""
    main = found.main
    if main is None:
        return False
    if len(main.law.axes) == 1:
        return _draw_line(main, path)
    first, second = (_range(main, j) for j in (0, 1))
    error = profile(main.law, main.x, main.loss, first, second)
    best = min(float(error.min()), main.law.error)
    names = main.law.axes
    with figure(path, width=6.2, height=4.8) as (_, (axes,)):
        shown = axes.contourf(second, first, np.log10(np.maximum(error / best, 1.0) + 1e-12), levels=24, cmap="Greys")
        axes.figure.colorbar(shown, ax=axes, pad=0.01, label="squared error beside the best, log10 of the ratio")
        region = threshold(main.law, 2)
        if error.max() <= region:
            axes.plot([], [], color="none", label="95 % region (F test): all that is shown")
        elif error.min() <= region:
            axes.contour(second, first, error, levels=[region], colors=[LAW], linewidths=1.6)
            axes.plot([], [], color=LAW, label="95 % region (F test)")
        k = len(names)
        axes.plot(main.trust.laws[:, 2 + k], main.trust.laws[:, 1 + k], ".", color=RUN, markersize=2.5, alpha=0.35,
                  label="resampled runs", zorder=2)
        axes.plot(main.law.exponents[1], main.law.exponents[0], "o", color=LAW, markeredgecolor="white", markersize=8,
                  label="least squares")
        axes.plot(main.second.exponents[1], main.second.exponents[0], "D", color=OTHER, markeredgecolor="white",
                  markersize=7, label="Huber's loss on logarithms")
        axes.set_xlim(second[0], second[-1])
        axes.set_ylim(first[0], first[-1])
        axes.set_xlabel(f"exponent of {names[1]}, {LABELS[names[1]]}")
        axes.set_ylabel(f"exponent of {names[0]}, {LABELS[names[0]]}")
        axes.legend(fontsize=8, labelcolor="black", frameon=True, framealpha=0.85, loc="best")
        identified = main.trust.exponents[0].identified and main.trust.exponents[1].identified
        axes.set_title("Profile of the exponents" + ("" if identified else ": not identified by these runs"))
    return True


def _draw_line(main: Fitted, path: Path) -> bool:
    """The profile of a law of one quantity."""
    exponents = _range(main, 0)
    error = profile_line(main.law, main.x, main.loss, exponents)
    best = min(float(error.min()), main.law.error)
    with figure(path, width=6.2, height=4.0) as (_, (axes,)):
        axes.plot(exponents, error / best, color="grey")
        axes.axhline(threshold(main.law) / best, color=LAW, linewidth=1.4, label="below: the 95 % region (F test)")
        axes.plot(main.law.exponents, [main.law.error / best], "o", color=LAW, label="least squares")
        axes.set(yscale="log", xlabel=f"exponent of {main.law.axes[0]}, {LABELS[main.law.axes[0]]}",
                 ylabel="squared error beside the best")
        axes.legend(fontsize=8)
        axes.set_title("Profile of the exponent" + ("" if main.trust.exponents[0].identified else
                                                    ": not identified by these runs"))
    return True


def _range(main: Fitted, axis: int) -> Array:
    """Exponents over which a profile is drawn: around the resamples, or all that could be where they do not say."""
    if not main.trust.exponents[axis].identified:
        return np.linspace(0.02, 1.02 * BOX[1], CLOUD)  # with room for a mark at the end of what is looked at
    interval, second = main.trust.exponents[axis], main.second.exponents[axis]
    low, high = min(interval.low, second), max(interval.high, second)
    reach = 0.6 * (high - low)
    return np.linspace(max(low - reach, 0.01), high + reach, CLOUD)
