"""Pictures of what else was varied: depth against length, and a score beside the loss."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyena_dist.tasks.scaling.analysis import Analysis
from hyena_dist.tasks.scaling.fit import Array
from hyena_dist.tasks.scaling.pictures import LABELS, RUN, coloured, figure, log_x
from hyena_dist.tasks.scaling.points import Point, without_seeds


def depth_map(points: Sequence[Point]) -> tuple[list[int], list[int], Array] | None:
    """(depths, lengths, lowest losses [depths, lengths], means over seeds, nan where there is no run); None unless both
    vary."""
    known = [point for point in without_seeds(points) if point.num_layers and point.seq_len]
    depths = sorted({int(point.num_layers or 0) for point in known})
    lengths = sorted({int(point.seq_len or 0) for point in known})
    if len(depths) < 2 or len(lengths) < 2:
        return None
    losses = np.full((len(depths), len(lengths)), np.nan)
    for point in known:
        place = depths.index(int(point.num_layers or 0)), lengths.index(int(point.seq_len or 0))
        losses[place] = point.loss if np.isnan(losses[place]) else min(losses[place], point.loss)
    return depths, lengths, losses


def draw_depth(found: Analysis, path: Path) -> bool:
    """The lowest loss of every depth at every length."""
    cells = depth_map(found.points)
    if cells is None:
        return False
    depths, lengths, losses = cells
    with figure(path, width=2.2 + 1.0 * len(lengths), height=1.6 + 0.6 * len(depths)) as (drawn, (axes,)):
        axes.grid(visible=False)
        shown = axes.imshow(losses, cmap="viridis_r", aspect="auto", origin="lower")
        drawn.colorbar(shown, ax=axes, pad=0.01, label="lowest loss")
        middle = (np.nanmin(losses) + np.nanmax(losses)) / 2
        for i in range(len(depths)):
            for j in range(len(lengths)):
                value = losses[i, j]
                best = not np.isnan(losses[:, j]).all() and value == np.nanmin(losses[:, j])
                axes.text(j, i, "no run" if np.isnan(value) else f"{value:.4f}", ha="center", va="center", fontsize=8,
                          color="grey" if np.isnan(value) else "white" if value > middle else "black",
                          weight="bold" if best else "normal")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axes.set_xlabel(LABELS["T"])
        axes.set_ylabel("layers")
        axes.set_title("Depth against length (bold: the best of a length)")
    return True


def draw_metric(found: Analysis, path: Path) -> bool:
    """A score of another kind against the loss and against size: it need not follow the loss."""
    known = [point for point in found.points if point.metric is not None]
    if not known:
        return False
    size, values = np.array([point.params for point in known]), [point.metric for point in known]
    name = known[0].metric_name
    tokens = np.array([point.tokens for point in known])
    with figure(path, 2, width=4.8, height=3.8) as (drawn, (left, right)):
        left.plot([point.loss for point in known], values, "o", color=RUN, markeredgecolor="white", markersize=6)
        left.invert_xaxis()
        left.set_xlabel("validation loss [nats], better to the right")
        left.set_ylabel(name)
        coloured(right, size, values, "D", tokens)
        log_x(right, "N")
        drawn.suptitle(f"{name} beside the loss")
    return True
