"""The numerics card: whether the precision of a run, on its device, orders variants as float32 on a CPU does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hyena_dist.config.errors import UserError
from hyena_dist.data.variants import Site, window_of
from hyena_dist.model.trained import Trained
from hyena_dist.tasks.score.observe import SCORES, score_sites

CARD = 64
"""Variants."""
MOST_WINDOW = 8192
LEAST = 0.99
"""Spearman's correlation below which the scores are not those of the model."""


class NumericsError(UserError):
    """The precision changes the order of the variants."""

    status = 3


@dataclass(frozen=True)
class Card:
    """What was found."""

    variants: int
    window: int
    spearman: float | None
    """Of llr_mean; None: the run is the reference itself, or there are too few variants."""
    note: str

    def facts(self) -> dict[str, Any]:
        """For a header."""
        return {"variants": self.variants, "window": self.window, "spearman": self.spearman, "note": self.note}


def measure(trained: Trained, sites: Sequence[Site], reference: np.ndarray, window: int, *,
            accept: bool = False) -> Card:
    """Score some variants as the run does, and in float32 on the CPU.

    Args:
        accept: whether a bad correlation is written down alone.

    Raises:
        NumericsError: it is below `LEAST`.
    """
    window = min(window, MOST_WINDOW)
    sites = [site for site in sites if max(site.removed, site.alt.size) + 1 <= window - window // 2
             and sum(window_of(site, window)) >= site.at + max(site.removed, site.alt.size)]
    if trained.precision == "fp32" and next(trained.model.parameters()).device.type == "cpu":
        return Card(0, window, None, "the run is in float32 on a CPU, which others are compared with")
    plain = trained.to("cpu", "fp32")
    if len(sites) < 3:
        return Card(len(sites), window, None, "too few variants to compare an order")
    column = list(SCORES).index("llr_mean")
    run, wide = (score_sites(each, sites, reference, window)[:, column] for each in (trained, plain))
    both = np.isfinite(run) & np.isfinite(wide)
    correlation = float(spearmanr(run[both], wide[both]).statistic) if both.sum() > 2 else float("nan")
    correlation = 1.0 if np.array_equal(run, wide, equal_nan=True) else correlation
    good = bool((np.isfinite(run) == np.isfinite(wide)).all()) and correlation >= LEAST
    if not good and not accept:
        raise NumericsError(f"in {trained.precision} on this device {len(sites)} of the variants are in another order "
                            f"than in float32 on a CPU: Spearman's correlation of llr_mean is {correlation:.4f}, below "
                            f"{LEAST}: give --precision fp32, or --accept-numerics if that does not matter")
    return Card(len(sites), window, correlation if np.isfinite(correlation) else None,
                f"Spearman's correlation of llr_mean in {trained.precision} with float32 on a CPU"
                + ("" if good else f", below {LEAST} and accepted"))
