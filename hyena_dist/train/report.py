"""report.png: the loss curves of a run, from its metrics.jsonl."""

import logging
import statistics
from pathlib import Path

from hyena_dist.runtime.files import write_whole
from hyena_dist.train.metrics import read_rows

logger = logging.getLogger(__name__)

MEDIAN_REACH = 15
"""Steps to each side in the running median of the training curve."""


def write_report(run_dir: Path) -> Path | None:
    """Draw training loss, validation perplexity and learning rate against tokens; None without matplotlib or rows."""
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
    train = [row for row in rows if row.split == "train"]
    val = [row for row in rows if row.split == "val"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[3, 1], layout="constrained")
    tokens = [row.tokens / 1e6 for row in train]
    top.plot(tokens, [row.perplexity for row in train], color="tab:blue", alpha=0.3, linewidth=0.8)
    top.plot(tokens, _running_median([row.perplexity for row in train]), color="tab:blue",
             label=f"training (median of {2 * MEDIAN_REACH + 1} steps)")
    if val:
        top.plot([row.tokens / 1e6 for row in val], [row.perplexity for row in val], "o-", color="tab:red",
                 markersize=4, label=f"validation (last {val[-1].perplexity:.4f})")
    top.set_ylabel("perplexity per base")
    lowest, highest = min(row.perplexity for row in rows), max(row.perplexity for row in rows)
    # Four equally likely bases are a perplexity of 4: what lies far above is the first steps only.
    top.set_ylim(lowest - 0.05, min(4.3, highest) if lowest < 4 else highest + 0.05)
    top.grid(alpha=0.3)
    top.legend()
    top.set_title(run_dir.name)
    bottom.plot(tokens, [row.lr for row in train], color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("training tokens (millions)")
    bottom.grid(alpha=0.3)
    path = run_dir / "report.png"
    write_whole(path, lambda aside: figure.savefig(aside, dpi=120))
    plt.close(figure)
    return path


def _running_median(values: list[float]) -> list[float]:
    return [statistics.median(values[max(0, i - MEDIAN_REACH) : i + MEDIAN_REACH + 1]) for i in range(len(values))]
