"""The rows of `score substitutions` as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.tasks.score.perplexity_report import pyplot
from hyena_dist.tasks.score.substitutions import MOVED, Row
from hyena_dist.tasks.score.tables import markdown

SITES, MOVES = "AUROC of the site", "outputs that move"
SAYS = {
    SITES: "How often a changed base is more surprising than an unchanged one of the same window; 0.5 is chance.",
    "accuracy": "How often the classifier, which learnt the species of training windows, is right on unchanged ones.",
    "mean move of an output": "In units of the standard deviation of that output over all windows; one window has "
                              "none.",
    MOVES: f"The share that move by more than {MOVED} of that standard deviation.",
    "classes that change": "The share of windows that are taken for another species than before."}


def report(rows: Sequence[Row], facts: Mapping[str, Any], picture: str) -> str:
    """The text.

    Args:
        picture: the name of the picture's file; "" where there is none.
    """
    lines = [f"# Single bases, and {facts['model']}", "",
             f"{rows[0].windows:,} windows of {facts['bases']:,} bases of split {facts['split']} of {facts['shards']}, "
             "in which some bases are replaced by others. Intervals hold 95 of 100 resamples of windows.", ""]
    lines += [f"![substitutions]({picture})", ""] if picture else []
    for what, says in SAYS.items():
        chosen = [row for row in rows if row.what == what]
        if not chosen:
            continue
        counts, models = sorted({row.substitutions for row in chosen}), list(dict.fromkeys(row.model for row in chosen))
        cells = {(row.model, row.substitutions): _cell(row) for row in chosen}
        lines += [f"## {what[0].upper()}{what[1:]}", "", says, "",
                  markdown([["", *(f"{count:,} substitution{'s' * (count != 1)}" for count in counts)],
                            *([model, *(cells[model, count] for count in counts)] for model in models)])]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if np.isnan(row.value):
        return "cannot be told"
    return f"{row.value:.4f}" + (f" ({row.low:.4f} to {row.high:.4f})" if np.isfinite(row.low) else "")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the AUROC of the site, and the share of outputs that move, with their intervals.

    Raises:
        ConfigError: matplotlib is missing.
    """
    plt = pyplot(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    sites = [row for row in rows if row.what == SITES]
    left.barh([row.model for row in sites], [row.value for row in sites], xerr=_reach(sites), color="tab:blue",
              alpha=0.7)
    left.axvline(0.5, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set(xlabel=SITES)
    moves = [row for row in rows if row.what == MOVES]
    counts, models = sorted({row.substitutions for row in moves}), list(dict.fromkeys(row.model for row in moves))
    for place, model in enumerate(models):
        chosen = [row for row in moves if row.model == model]
        beside = 1 + 0.05 * (place - (len(models) - 1) / 2)  # intervals of several models do not lie on each other
        right.errorbar([beside * row.substitutions for row in chosen], [row.value for row in chosen],
                       yerr=_reach(chosen), marker="o", markersize=4, linewidth=1.2, capsize=2, label=model)
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [f"{count:,}" for count in counts])
    right.set(xlabel="substitutions of a window", ylim=(0, 1.02),
              ylabel=f"share of outputs that move\nby more than {MOVED} standard deviations")
    if models:
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _reach(rows: Sequence[Row]) -> np.ndarray:
    """[2, n], how far the ends of intervals are from their numbers; 0 where there are none."""
    ends, values = np.array([[row.low, row.high] for row in rows]), np.array([[row.value] for row in rows])
    return np.nan_to_num(np.abs(ends - values)).T
