"""The rows of `score perplexity` as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.score.perplexity import Found, Row
from hyena_dist.tasks.score.tables import markdown

HEADINGS = {
    "all": "All bases", "case": "By case", "region": "By region", "source": "By source", "species": "By species",
    "G and C": "By the share of G and C of the window",
    "context": "The same bases with shorter context",
    "position": "By place in the window"}
SAYS = {
    "context": "Each target of the second half of the windows (of their longest power of two) is predicted again from "
               "fewer tokens before it. The bases are the same in every row.",
    "position": "How many tokens of the window stand before and up to the one that predicts. The bases of the rows "
                "differ. The model does not see what is before its window; the Markov chains read up to 7 bases before "
                "every target all the same, so that in rows of fewer tokens they are told more, and the gain is no "
                "comparison there.",
    "region": "A base in rows of several classes counts in each."}


def report(found: Found, facts: Mapping[str, Any], picture: str) -> str:
    """The text.

    Args:
        picture: the name of the picture's file; "" where there is none.
    """
    lines = [f"# Perplexity of {facts['model']}", "",
             f"Split {facts['split']} of {facts['shards']}, windows of {facts['window']:,} tokens, "
             f"{facts['precision']}. Perplexities are per base. Intervals hold 95 of 100 resamples of "
             f"{found.blocks:,} blocks of {facts['block']:,} bases. The gain is how many nats a base the model is "
             "better than the Markov chain that is best on the same bases, of orders 0 to 7, fitted on the training "
             "bases of the same shards.", ""]
    lines += [f"- {note}" for note in found.notes] + ([""] if found.notes else [])
    lines += [f"![perplexity]({picture})", ""] if picture else []
    for by, heading in HEADINGS.items():
        if rows := [row for row in found.rows if row.by == by]:
            lines += [f"## {heading}", "", *([SAYS[by], ""] if by in SAYS else []),
                      markdown([[by, "bases", "blocks", "perplexity", "interval", "best chain", "gain", "interval"],
                                *map(_cells, rows)])]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    best = int(np.argmin(row.markov))
    return [row.group, f"{row.bases:,}", f"{row.blocks:,}", f"{row.perplexity:.4f}", _interval(row.low, row.high),
            f"{row.markov[best]:.4f} (order {best})", f"{row.gain:+.4f}", _interval(row.gain_low, row.gain_high)]


def _interval(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}" if np.isfinite(low) else "one block"


def draw(found: Found, path: Path, title: str) -> None:
    """Draw perplexity against context and position, and the gain over the best chain by group.

    Raises:
        ConfigError: matplotlib is missing.
    """
    plt = pyplot(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for by, marker in (("context", "o"), ("position", "s")):
        rows = [row for row in found.rows if row.by == by]
        if rows:
            at = [int(row.group.rpartition(" ")[2].replace(",", "")) for row in rows]
            left.plot(at, [row.perplexity for row in rows], marker=marker, markersize=4,
                      label={"context": "the same bases, by context", "position": "by place in the window"}[by])
            left.fill_between(at, [row.low for row in rows], [row.high for row in rows], alpha=0.2)
    best = min(found.rows[0].markov)
    left.axhline(best, color="grey", linestyle="--", label="best Markov chain, all bases")
    left.set_xscale("log", base=2)
    left.set(xlabel="tokens before and up to the one that predicts", ylabel="perplexity per base")
    left.legend(fontsize=8)
    groups = [row for row in found.rows if row.by not in ("context", "position")]
    _bars(right, groups)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    gains = np.array([row.gain for row in rows])
    ends = np.array([[row.gain_low, row.gain_high] for row in rows])
    errors = np.nan_to_num(np.abs(ends.T - gains)).clip(min=0)
    axes.barh(range(len(rows)), gains, xerr=errors, color="tab:blue", alpha=0.7)
    axes.set_yticks(range(len(rows)), [("" if row.by == "all" else f"{row.by}: ") + row.group
                                       + (" (one block)" if row.blocks == 1 else "") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="nats a base better than the best Markov chain")


def pyplot(path: Path) -> Any:
    """matplotlib without a screen.

    Raises:
        ConfigError: it is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(f"{path}: is drawn by matplotlib; install it with pip install 'hyena-dist[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt
