"""All that is found in the runs of a sweep: which of them count, laws with intervals, best sizes, and warnings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.scaling.bootstrap import MIN_RUNS, MIN_RUNS_FLOOR, RESAMPLES, Trust, bootstrap
from hyena_dist.tasks.scaling.fit import Array, Law, check_runs, huber, variable_projection
from hyena_dist.tasks.scaling.optimum import Allocation, Parabola, allocate, biased_powers, fit_cost, parabolas
from hyena_dist.tasks.scaling.points import Left, Point, choose
from hyena_dist.train.wording import amount

MOST_EPOCHS = 4.0
"""Passes over the data up to which repeated tokens are about as good as new ones (Muennighoff et al. 2023)."""
FARTHEST = 10.0
"""How many times the largest measured budget a law may be asked about without a warning."""
COARSE_COST = 0.1
"""Relative error of the operations a token, as a power of the size, from which on it is warned of."""
AXES = {"N": "weights", "D": "tokens", "T": "length"}


@dataclass(frozen=True)
class Fitted:
    """The law of some of the runs."""

    name: str
    """Of these runs, as "all runs"."""
    points: tuple[Point, ...]
    law: Law
    """By variable projection."""
    second: Law
    """By Huber's loss."""
    trust: Trust
    x: Array
    loss: Array

    @property
    def residuals(self) -> Array:
        """Relative: (measured - law) / law, [n]."""
        expected = self.law(self.x)
        return (self.loss - expected) / expected


@dataclass(frozen=True)
class Analysis:
    """What a report says."""

    points: tuple[Point, ...]
    left: tuple[Left, ...]
    fits: tuple[Fitted, ...]
    """The first is what the rest is computed from; none where there are too few runs."""
    no_fit: str
    """Why there is no law; empty: there is."""
    parabolas: tuple[Parabola, ...] = ()
    biased: tuple[float, float] | None = None
    allocation: Allocation | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def main(self) -> Fitted | None:
        return self.fits[0] if self.fits else None


def analyse(rows: Iterable[Mapping[str, Any]], *, min_steps: int = 0, floor: float | None = None,
            budgets: Sequence[float] = (), resamples: int = RESAMPLES) -> Analysis:
    """Fit what the rows of a sweep can be fitted to.

    Args:
        rows: as `points.read_points` has them.
        min_steps: runs of fewer steps are left out.
        floor: E, where it is known from larger runs on the same data.
        budgets: of operations, of which the best size is asked; none: those between the smallest and ten times the
            largest that was measured.

    Raises:
        ConfigError: no run is left, or a row or an argument makes no sense.
    """
    if floor is not None and not 0 < floor < math.inf:
        raise ConfigError(f"a floor of {floor:g}: the loss is above 0: give a number of nats")
    if wrong := [budget for budget in budgets if not 0 < budget < math.inf]:
        raise ConfigError(f"a budget of {wrong[0]:g} operations: give numbers greater than 0")
    points, left = choose(rows, min_steps=min_steps)
    if not points:
        why = f"the first, {left[0].id}: {left[0].reason}" if left else "there are no rows"
        raise ConfigError(f"no run is left to report on ({why}): give finished runs, each with its weights, "
                          "tokens and validation loss")
    fits, no_fit = _fits(points, floor, resamples)
    curves = parabolas(points)
    allocation = _allocation(fits, points, budgets) if fits else None
    return Analysis(tuple(points), tuple(left), tuple(fits), no_fit, tuple(curves), biased_powers(curves), allocation,
                    tuple(_warnings(points, fits, curves, allocation)))


def epochs_of(point: Point) -> float | None:
    """Passes over the data, from what the point records."""
    if point.epochs is not None:
        return point.epochs
    return point.tokens / point.unique_tokens if point.unique_tokens else None


def quantities(points: Sequence[Point], axes: Sequence[str]) -> Array:
    """[n, k] of N, D and T."""
    values = {"N": [p.params for p in points], "D": [p.tokens for p in points], "T": [p.seq_len or 1.0 for p in points]}
    return np.array([values[axis] for axis in axes]).T


def varied_axes(points: Sequence[Point]) -> list[str]:
    """Of N, D and T those that have at least three values, more than 1 in 1,000 apart."""
    known = ["N", "D", *(["T"] if all(point.seq_len for point in points) else [])]
    return [axis for axis in known if len(np.unique(np.round(np.log(quantities(points, [axis])), 3))) >= 3]


def _fits(points: Sequence[Point], floor: float | None, resamples: int) -> tuple[list[Fitted], str]:
    """The law of the runs on unique data first, where they are enough to identify one, and why there is none."""
    repeated = [point for point in points if (epochs_of(point) or 0.0) > 1.0]
    unique = [point for point in points if point not in repeated]
    parts = {"runs of at most one epoch": unique, "runs that repeat data": repeated}
    enough = MIN_RUNS if floor is None else MIN_RUNS_FLOOR
    if len({point.family for point in unique}) < enough or varied_axes(unique) != varied_axes(points):
        parts = {}  # a law of few of them, or of fewer quantities, would hide what only all runs tell
    parts = {**{name: part for name, part in parts.items() if part and part != points}, "all runs": points}
    fits, reasons = [], []
    for name, part in parts.items():
        axes = varied_axes(part)
        loss = np.array([point.loss for point in part])
        if not axes:
            reasons.append(f"{name}: neither weights nor tokens nor length has three values")
            continue
        try:
            check_runs(quantities(part, axes), loss, axes, floor=floor)
        except ConfigError as error:
            if floor is not None and floor >= loss.min():
                raise
            reasons.append(f"{name}: {error}")
            continue
        fits.append(_fit(name, part, axes, loss, floor, resamples))
    return fits, "" if fits else "; ".join(reasons)


def _fit(name: str, part: Sequence[Point], axes: Sequence[str], loss: Array, floor: float | None,
         resamples: int) -> Fitted:
    x = quantities(part, axes)
    law = variable_projection(x, loss, axes, floor=floor)
    trust = bootstrap(law, x, loss, families=[point.family for point in part], resamples=resamples)
    return Fitted(name, tuple(part), law, huber(x, loss, axes, floor=floor), trust, x, loss)


def _allocation(fits: Sequence[Fitted], points: Sequence[Point], budgets: Sequence[float]) -> Allocation | None:
    """Best sizes by the first law, where it is one of weights and tokens and operations are known."""
    law, cost = fits[0].law, fit_cost(points)
    if law.axes[:2] != ("N", "D") or cost is None:
        return None
    flops = [point.flops for point in points if point.flops]
    asked = list(budgets) or [*np.geomspace(min(flops), max(flops), 5).tolist(), FARTHEST * max(flops)]
    return allocate(law, fits[0].trust, cost, asked, smallest=min(flops), largest=max(flops))


def _warnings(points: Sequence[Point], fits: Sequence[Fitted], curves: Sequence[Parabola],
              allocation: Allocation | None) -> Iterable[str]:
    if without := [point.id for point in points if not point.flops]:
        yield (f"{len(without)} of {len(points)} runs have no exact operations ({_some(without)}): they are in the fit "
               "of the loss, and not in what a budget buys.")
    for curve in curves:
        if curve.size is None:
            side = ("the losses have no lowest point between" if curve.coefficients[0] <= 0 else
                    "the best is likely smaller: add smaller sizes" if curve.losses[0] < curve.losses[-1] else
                    "the best is likely larger: add larger sizes")
            yield (f"Optimum not bracketed at {curve.flops:.2g} operations: sizes from {amount(curve.sizes[0])} to "
                   f"{amount(curve.sizes[-1])} weights were trained, and {side}.")
    if many := [point.id for point in points if (epochs_of(point) or 0.0) > MOST_EPOCHS]:
        yield (f"{len(many)} runs read their data more than {MOST_EPOCHS:g} times ({_some(many)}): tokens that are "
               "repeated so often count less than new ones, and the law takes them as equal.")
    if len(fits) > 1:
        yield (f"Some runs repeat data and some do not. They are fitted apart, and the numbers below are of the "
               f"{fits[0].name}.")
    elif any((epochs_of(point) or 0.0) > 1.0 for point in points) and any((epochs_of(point) or 2.0) <= 1.0
                                                                           for point in points):
        yield "Some runs repeat data and some do not, and there are too few of either to fit them apart."
    rates: dict[tuple[float, float, float | None], set[float | None]] = {}
    for point in points:
        rates.setdefault((point.params, point.tokens, point.seq_len), set()).add(point.lr)
    if several := sum(len(of_cell) > 1 for of_cell in rates.values()):
        yield (f"{several} combinations of size, tokens and length were trained at several learning rates, and the law "
               "goes through the middle of them. For a law of well-tuned runs report on the best rate of each.")
    for fitted in fits[:1]:
        yield from _disagreements(fitted)
    if allocation is not None:
        if allocation.cost.worst > COARSE_COST:
            yield (f"Operations a token are a power of the size only within {100 * allocation.cost.worst:.0f} % in "
                   "these runs (depth, width or length vary beside the size): best sizes carry that error.")
        if far := [row for row in allocation.rows if row.beyond > FARTHEST * 1.0001]:
            yield (f"{len(far)} of the budgets asked about are more than {FARTHEST:g} times the largest that was "
                   f"measured, up to {far[-1].beyond:.3g} times: an extrapolation, whose interval knows nothing of a "
                   "law that bends.")


def _disagreements(fitted: Fitted) -> Iterable[str]:
    """Where the two methods differ by more than the intervals, the searches end in several places, or a run is far from
    its law."""
    for axis, interval, second in zip(fitted.law.axes, fitted.trust.exponents, fitted.second.exponents, strict=True):
        if interval.identified and not interval.low <= second <= interval.high:
            yield (f"The two methods differ on the exponent of {axis} by more than its interval: {second:.3f} by "
                   f"Huber's loss, and {interval.low:.3f} to {interval.high:.3f} by least squares. The fit by "
                   "logarithms weighs small losses more: look at the residuals.")
    if 2 * fitted.second.agree < fitted.second.starts:
        yield (f"Only {fitted.second.agree} of {fitted.second.starts} searches by Huber's loss ended in the same "
               "place: the law is badly determined by these runs.")
    size = np.abs(fitted.residuals)
    middle = float(np.median(size))
    far = [point.id for point, residual in zip(fitted.points, size, strict=True) if residual > max(8 * middle, 1e-4)]
    if far:
        yield (f"{len(far)} runs lie more than 8 times the usual distance from the law ({_some(far)}). They are in the "
               "fit; look for what was different in them.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
