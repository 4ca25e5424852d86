"""The rows of `score distance` as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.data.variants import OUTCOMES
from hyena_dist.tasks.score.distance import LEAST, WAYS, Row
from hyena_dist.tasks.score.perplexity_report import pyplot
from hyena_dist.tasks.score.tables import markdown

SAYS = {"loss": ("Loss", "Nats a base of the last bases of {count:,} held-out windows. The change is against whole "
                 "windows, which have {value:.4f}."),
        "variants": ("Scores of variants", "Of {count:,} variants llr_sum: Spearman's correlation with that of whole "
                     "windows, and how far it is from it in the mean.")}


def conclusion(rows: Sequence[Row], way: str) -> str:
    """What the intervals of a way's losses say. A loss is surely larger than that of whole windows where its interval
    begins above 0, and surely smaller where it ends below. The distance that is named is the shortest from which on no
    loss is surely larger."""
    of_way = sorted((row for row in rows if (row.of, row.way) == ("loss", way)), key=lambda row: row.distance)
    if any(np.isnan(row.change_low) for row in of_way):
        return "one window has no interval, so that nothing can be told: read more with --most"
    larger = [row.distance for row in of_way if row.change_low > 0]
    smaller = [f"{row.distance:,}" for row in of_way if row.change_high < 0]
    rest = [row.distance for row in of_way if not larger or row.distance > larger[-1]]
    said = (f"beyond {rest[0]:,} bases the loss is not surely larger" if rest else
            f"without what is beyond {larger[-1]:,} bases, the longest distance here, the loss is surely larger")
    return said + (f"; without what is beyond {', '.join(smaller)} bases it is surely smaller" if smaller else "")


def report(rows: Sequence[Row], facts: Mapping[str, Any], picture: str) -> str:
    """The text.

    Args:
        picture: the name of the picture's file; "" where there is none.
    """
    lines = [f"# How far {facts['model']} looks", "",
             f"Split {facts['split']} of {facts['shards']}, windows of {facts['window']:,} bases, "
             f"{facts['precision']}. "
             "What lies further away than a distance is cropped, shuffled (its pairs of neighbours are kept) or masked "
             "(N). Intervals hold 95 of 100 resamples.", ""]
    lines += [f"- {way}: {conclusion(rows, way)}" for way in WAYS]
    lines += ["", f"![distance]({picture})", ""] if picture else [""]
    for of, (heading, text) in SAYS.items():
        of_kind = [row for row in rows if row.of == of]
        if of_kind:
            lines += [f"## {heading}", "", text.format(**vars(of_kind[0])), "", *_outcomes(facts, of),
                      markdown([["", "distance", "value", "interval", "change", "interval"],
                                *([row.way, f"{row.distance:,}", f"{row.value:.4f}", _interval(row.low, row.high),
                                   f"{row.change:+.4f}", _interval(row.change_low, row.change_high)]
                                  for row in of_kind if row.way != "whole")])]
    return "\n".join(lines)


def _outcomes(facts: Mapping[str, Any], of: str) -> list[str]:
    """Of variants, lines that say how many the file has, and why the others have no scores."""
    if of != "variants":
        return []
    counts = facts["counts"]
    says = OUTCOMES | {"too_long": f"an allele has more than {LEAST} bases, the shortest distance"}
    return [f"{counts['scored']:,} of the {sum(counts.values()):,} alleles of {facts['variants']} can be scored.", "",
            *(f"- {count:,} {name}: {says[name]}" for name, count in counts.items() if name != "scored"),
            *([""] if len(counts) > 1 else [])]


def _interval(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}" if np.isfinite(low) else "cannot be told"


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the change of the loss, and the correlation of the scores, against distance.

    Raises:
        ConfigError: matplotlib is missing.
    """
    plt = pyplot(path)
    kinds = [of for of in SAYS if any(row.of == of for row in rows)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), layout="constrained", squeeze=False)
    for of, axis in zip(kinds, axes[0], strict=True):
        for way in WAYS:
            chosen = [row for row in rows if (row.of, row.way) == (of, way)]
            at, is_loss = [row.distance for row in chosen], of == "loss"
            axis.plot(at, [row.change if is_loss else row.value for row in chosen], marker="o", markersize=4, label=way)
            axis.fill_between(at, [row.change_low if is_loss else row.low for row in chosen],
                              [row.change_high if is_loss else row.high for row in chosen], alpha=0.2)
        axis.axhline(0 if of == "loss" else 1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="bases that are kept", ylabel="nats a base more than of whole windows" if of == "loss" else
                 "Spearman's correlation with whole windows")
        axis.legend(title="beyond them", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
