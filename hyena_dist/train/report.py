"""report.png: every metric of a run against the tokens that it has seen, from its metrics.jsonl."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyena_dist.config.plain import read_object
from hyena_dist.runtime.files import write_whole
from hyena_dist.train.metrics import METRICS, Row, elapsed, metric_of, read_rows
from hyena_dist.train.wording import amount, duration, scale_of, score

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
"""What launchers/evaluate.py leaves in a run directory; its Markov chains are what a model must beat."""
MOST_REACH = 15
"""Steps to each side in the running median of a long run."""
STEPS_PER_REACH = 20
"""A running median reaches one step to each side for as many steps of the run."""
COLORS = {"train": "tab:blue", "val": "tab:red"}
MAIN = ("loss", "perplexity")
WIDTH, LEFT, RIGHT, ABOVE, BELOW, FOOT = 10.0, 0.7, 0.8, 0.35, 0.55, 0.4
BETWEEN = 0.7, 0.52
"""Inches of the figure, around its charts, of the sentence under them, and between charts beside and over each other.
matplotlib can find such margins itself, and places for titles; it draws everything several times for them, which takes
a CPU more than a second."""
MARGIN = 1.12
"""Where the top chart ends, in all tokens of the run, if what is beside its curves has names there."""
EASIER = ("Validation lies below training. It scores other bases, which may be of other species or of regions that are "
          "easier to predict, such as repeats;\nand it scores the model after a step and without dropout, where a "
          "training loss is from before the step.")


def write_report(run_dir: Path, scored_name: str = "bases") -> Path | None:
    """Draw every metric of the rows against training tokens; None without matplotlib or rows.

    Args:
        scored_name: what the run's objective scores.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("no report.png: matplotlib is missing; install it with pip install 'hyena-dist[plots]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(run_dir / "metrics.jsonl")
    if not rows:
        return None
    unit, unit_name = scale_of(max(row.tokens for row in rows))
    last = max(row.tokens for row in rows) / unit
    series = _series(rows, unit)
    panels = list(dict.fromkeys(name.partition("/")[0] for name in series
                                if name not in MAIN and not metric_of(name).beside))
    lines = -(-len(panels) // 2)
    below = bool(series["perplexity"]) and _validation_is_below(series["perplexity"])
    figure = plt.figure(figsize=(WIDTH, 4.5 + 1.9 * lines))
    grid = _grid(figure, lines, foot=FOOT if below else 0.0)
    top = figure.add_subplot(grid[0, :])
    if series["perplexity"]:
        _draw_perplexity(top, series["perplexity"], _floors(run_dir / EVALUATION), last)
    else:  # of labels
        _draw_points(top, series.get("loss", {}), smooth=True)
        top.set_ylabel("loss")
        if series.get("loss"):
            top.legend(fontsize=8)
    top.set_title(_title(run_dir.name, rows), y=1.0)
    all_axes = [top]
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1 + number // 2, number % 2])
        _draw_panel(axes, panel, series.get(panel, {}), scored_name)
        _draw_members(axes, {name: points for name, points in series.items() if name.startswith(f"{panel}/")})
        for name in series:
            if metric_of(name).beside == panel and (of_training := series[name].get("train")):
                axes.plot(*of_training, color="black", linewidth=1.0, label=metric_of(name).label)
                axes.legend(fontsize=7)
        all_axes.append(axes)
    for axes in all_axes:
        axes.set_xlim(0, last * (MARGIN if axes.texts else 1.01) or 1)
        axes.grid(alpha=0.3)
    for axes in all_axes[-2:] if panels else all_axes:
        axes.set_xlabel(f"training tokens{unit_name and f' [{unit_name}s]'}")
    if below:
        figure.text(0.5, 0.08 / figure.get_figheight(), EASIER, fontsize=8, ha="center", va="bottom")
    path = run_dir / "report.png"
    write_whole(path, lambda aside: figure.savefig(aside, dpi=90))
    plt.close(figure)
    return path


def _grid(figure: Any, lines: int, *, foot: float) -> Any:
    """A wide place at the top and `lines` of two places each, over a foot of so many inches."""
    height = figure.get_figheight()
    ratios = [2.2] + [1.0] * lines
    beside, over = BETWEEN
    mean_width = (WIDTH - LEFT - RIGHT - beside) / 2
    mean_height = (height - ABOVE - BELOW - foot - over * lines) / len(ratios)
    return figure.add_gridspec(len(ratios), 2, height_ratios=ratios, left=LEFT / WIDTH, right=1 - RIGHT / WIDTH,
                               top=1 - ABOVE / height, bottom=(BELOW + foot) / height, wspace=beside / mean_width,
                               hspace=over / mean_height)


Points = Mapping[str, tuple[list[float], list[float]]]
"""Of each split: tokens, in the figure's unit, and values; only finite ones."""


def _series(rows: Sequence[Row], unit: float) -> dict[str, Points]:
    """The points of each metric that has any, in the order of `METRICS`, then those that are not in it."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {metric.name: {} for metric in METRICS}
    for row, seconds in zip(rows, elapsed(rows), strict=True):
        for name, value in {**row.values(), "wall_time": seconds}.items():
            points = found.setdefault(name, {}).setdefault(row.split, ([], []))
            if math.isfinite(value):
                points[0].append(row.tokens / unit)
                points[1].append(value / metric_of(name).unit)
    return {name: points for name, points in found.items() if points or name == "perplexity"}


def _draw_perplexity(axes: Any, points: Points, floors: Sequence[float], last: float) -> None:
    """Training and validation, with the loss as the scale on the right and the Markov chains that are known, whose
    names stand beyond the last of the tokens, where no curve is."""
    import numpy as np

    _draw_points(axes, points, smooth=True)
    axes.set_ylabel(metric_of("perplexity").label)
    values = [value for _, of_split in points.values() for value in of_split]
    if values:
        lowest, highest = min(values), max(values)
        if lowest < 4:  # as of four equally likely bases: what lies far above is the first steps only
            lowest, cut = min([lowest, *floors]), max(4.3, sorted(values)[3 * len(values) // 4])
            axes.set_ylim(lowest - 0.05, max(min(cut, highest + 0.05), lowest + 0.1))
        elif highest > 100 * lowest:
            axes.set_yscale("log")
    for order, floor in enumerate(floors):
        axes.plot([0, last], [floor, floor], color="tab:gray", linestyle=":", linewidth=0.9,
                  label=f"Markov chains of order 0 to {len(floors) - 1}" if order == 0 else None)
    bottom, top = axes.get_ylim()
    labelled = -math.inf
    for floor, order in sorted((floor, order) for order, floor in enumerate(floors)):  # the hardest to beat has a name
        if bottom < floor < top and floor - labelled > 0.045 * (top - bottom):
            axes.text(1.01 * last, floor, f"order {order}: {floor:.4f}", va="center", fontsize=7, color="dimgray",
                      clip_on=True)
            labelled = floor
    right = axes.secondary_yaxis("right", functions=(lambda value: np.log(np.maximum(value, 1e-9)),
                                                     lambda loss: np.exp(np.minimum(loss, 700))))
    right.set_ylabel(metric_of("loss").label)
    if points:
        axes.legend(loc="upper center", fontsize=8)


def _draw_panel(axes: Any, name: str, points: Points, scored_name: str) -> None:
    if name == "wall_time":
        seconds = max(value for _, values in points.values() for value in values)
        size, unit = next((size, unit) for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
                          if seconds >= 2 * size or size == 1)
        points, label, smooth = _divided(points, size), f"time since the first row [{unit}]", False
    elif name == "scored":
        scale, unit = scale_of(max((value for _, values in points.values() for value in values), default=0))
        points, label, smooth = _divided(points, scale), f"{scored_name} scored{unit and f' [{unit}s]'}", True
    else:
        metric = metric_of(name)
        label, smooth = metric.label, metric.smooth
        if metric.log and all(value > 0 for _, values in points.values() for value in values):
            axes.set_yscale("log")
    _draw_points(axes, points, smooth=smooth, legend=False)
    axes.set_title(label, fontsize=9, y=1.0)  # at the left a power of ten may stand
    axes.tick_params(labelsize=8)


def _divided(points: Points, unit: float) -> Points:
    return {split: (tokens, [value / unit for value in values]) for split, (tokens, values) in points.items()}


def _draw_members(axes: Any, series: Mapping[str, Points]) -> None:
    """A metric that there is for several things: a line for each, by what stands behind the slash of its name."""
    for name, points in series.items():
        for tokens, values in points.values():
            axes.plot(tokens, values, ".-", linewidth=1.0, markersize=4, label=name.partition("/")[2])
    if series:
        axes.legend(fontsize=6, ncols=-(-len(series) // 6))


def _draw_points(axes: Any, points: Points, *, smooth: bool, legend: bool = True) -> None:
    """Training as a line, with a running median where the run is long enough for one; validation as dots."""
    if "train" in points:
        tokens, values = points["train"]
        reach = _reach(len(values)) if smooth else 0
        axes.plot(tokens, values, color=COLORS["train"], alpha=0.3 if reach else 1.0, linewidth=0.8 if reach else 1.2,
                  marker="." if len(values) < 2 else None, label=None if reach or not legend else "training")
        if reach:
            axes.plot(tokens, running_median(values), color=COLORS["train"], linewidth=1.2,
                      label=f"training (median of {2 * reach + 1} steps)" if legend else None)
    if "val" in points:
        tokens, values = points["val"]
        axes.plot(tokens, values, "o-", color=COLORS["val"], markersize=4, linewidth=1.0,
                  label=f"validation (last {score(values[-1])})" if legend and values else None)


def _reach(steps: int) -> int:
    return min(MOST_REACH, steps // STEPS_PER_REACH)


def running_median(values: list[float]) -> list[float]:
    """The median over as many values to each side as a run of this length has. At the start, where curves are steep, it
    is over fewer, the same number to each side; at the end, where they are flat, over those that there are."""
    reach = _reach(len(values))
    return [statistics.median(values[max(0, i - reach) : i + min(reach, i) + 1]) for i in range(len(values))]


def _validation_is_below(points: Points) -> bool:
    """Whether the last validation lies below the training around it."""
    if not all(points.get(split, ((), ()))[1] for split in ("train", "val")):
        return False
    (train_tokens, train), (val_tokens, val) = points["train"], points["val"]
    before = sum(tokens <= val_tokens[-1] for tokens in train_tokens)
    around = train[max(0, before - 1 - 2 * _reach(len(train))) : before]
    return bool(around) and val[-1] < statistics.median(around)


def _floors(path: Path) -> list[float]:
    """Perplexities of the Markov chains of order 0 upwards on the validation split; none where they are not known."""
    try:
        content = read_object(path)
        floors = [float(value) for value in content["markov"]] if content["split"] == "val" else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: the Markov chains in it cannot be read (%s): evaluate the run again", path, error)
        return []
    return [floor for floor in floors if math.isfinite(floor)]


def _title(name: str, rows: Sequence[Row]) -> str:
    last = max(rows, key=lambda row: row.step)
    parts = [f"{last.step:,} steps", f"{amount(last.tokens)} tokens"]
    if last.epoch is not None:
        parts.append(f"{last.epoch:.2f} epochs")
    return f"{name}: {', '.join([*parts, duration(elapsed(rows)[-1])])}"
