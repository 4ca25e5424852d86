"""How far a fitted law can be trusted: refits of resampled runs, and what they cannot say.

Runs are drawn again with replacement, whole families at a time: the forks of one run share most of their training, and
are not as good as that many runs. All resamples are refitted together, by Levenberg and Marquardt's method from the
law itself, in the logarithms of floor and amplitudes, so that none is negative: the least squares of
`fit.variable_projection`, in a fraction of a second for a thousand.

The quantiles are those of the expanded percentile interval (Hesterberg 2015): the plain ones are too narrow by what the
fitted numbers take from the residuals, and held known exponents in 91 of 100 cases instead of 95.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as t_distribution

from hyena_dist.tasks.scaling.fit import BOX, NEGLIGIBLE, Array, Law, profile_is_open

RESAMPLES = 1000
MIN_RUNS, MIN_RUNS_FLOOR = 25, 12
"""Families below which a floor and exponents are not told apart, and below which exponents are not where the floor is
given."""
MOST_AT_A_BOUND = 0.025
"""Share of resamples that may end at a bound: with more, an end of the interval would be the bound itself."""
STEPS = 60


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, or why there is none."""

    low: float
    high: float
    reason: str = ""
    """Why the number is not identified; empty: it is."""

    @property
    def identified(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Trust:
    """What the resamples of a law say."""

    laws: Array
    """Refits [R, 1 + 2k]: floor, amplitudes, exponents; those that ended at a bound included."""
    floor: Interval
    exponents: tuple[Interval, ...]
    amplitudes: tuple[Interval, ...]
    tail: float
    """The quantile at which an interval ends, a little below 0.025."""

    @property
    def identified(self) -> bool:
        """Whether every exponent is."""
        return all(interval.identified for interval in self.exponents)

    def interval(self, values: Array) -> Interval:
        """Of any number that was computed of every resample, [R]."""
        low, high = np.quantile(values, [self.tail, 1 - self.tail])
        return Interval(float(low), float(high))


def bootstrap(law: Law, x: Array, loss: Array, *, families: Sequence[str] | None = None, resamples: int = RESAMPLES,
              seed: int = 0) -> Trust:
    """Intervals of a law of `variable_projection`.

    Args:
        x: quantities [n, k]; loss: [n].
        families: of each run, the run that it was forked from in the end; None: no run is a fork.
    """
    k, number = len(law.axes), _numbers(families, len(loss))
    count = int(number.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    centre = np.log(x).mean(0)
    found, done = _refit(_as_start(law, centre, loss), np.log(x) - centre, loss, draws[:, number].astype(float),
                         free_floor=not law.floor_given)
    laws = np.concatenate([np.exp(found[:, :1]), np.exp(found[:, 1:1 + k] + found[:, 1 + k:] * centre),
                           found[:, 1 + k:]], 1)
    left = max(count - law.parameters, 1)
    tail = float(norm.cdf(-np.sqrt(count / left) * t_distribution.ppf(0.975, left)))
    terms = np.exp(found[:, 1:1 + k] + found[:, 1 + k:] * -(np.log(x) - centre).min(0))  # largest values, [R, k]
    reasons = [_reason(law, x, loss, j, count, ~done | (terms[:, j] < NEGLIGIBLE * loss.mean())
                       | (found[:, 1 + k + j] <= BOX[0] * 1.01) | (found[:, 1 + k + j] >= BOX[1] / 1.01))
               for j in range(k)]
    no_floor = "" if law.floor_given else _no_floor(laws[:, 0] < NEGLIGIBLE * loss.mean(), reasons, law.axes)

    def ends(values: Array, reason: str) -> Interval:
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(float(low), float(high), reason)

    return Trust(laws, ends(laws[:, 0], no_floor), tuple(ends(laws[:, 1 + k + j], reasons[j]) for j in range(k)),
                 tuple(ends(laws[:, 1 + j], reasons[j]) for j in range(k)), tail)


def _reason(law: Law, x: Array, loss: Array, axis: int, families: int, at_bound: NDArray[np.bool_]) -> str:
    """Why an exponent is not identified, or nothing."""
    needed = MIN_RUNS_FLOOR if law.floor_given else MIN_RUNS
    if families < needed:
        return (f"{families} independent runs, and at least {needed} are needed"
                + ("" if law.floor_given else ", or a floor that is known from larger runs"))
    if why := profile_is_open(law, x, loss, axis):
        return why
    share = float(at_bound.mean())
    return f"{100 * share:.0f} % of the resamples end at a bound" if share > MOST_AT_A_BOUND else ""


def _no_floor(at_zero: NDArray[np.bool_], reasons: Sequence[str], axes: Sequence[str]) -> str:
    """A floor is what is left of the loss beside the terms: without an exponent there is none."""
    for axis, reason in zip(axes, reasons, strict=True):
        if reason:
            return f"the exponent of {axis} is not"
    share = float(at_zero.mean())
    return f"{100 * share:.0f} % of the resamples have none" if share > MOST_AT_A_BOUND else ""


def _numbers(families: Sequence[str] | None, runs: int) -> NDArray[np.int64]:
    if families is None:
        return np.arange(runs)
    known = {family: number for number, family in enumerate(dict.fromkeys(families))}
    return np.array([known[family] for family in families])


def _as_start(law: Law, centre: Array, loss: Array) -> Array:
    """The law as [1 + 2k] for `_refit`: logarithms of floor and of amplitudes at the centre, and exponents."""
    exponents = np.array(law.exponents)
    at_centre = np.array(law.amplitudes) * np.exp(-exponents * centre)
    least = 1e-3 * float(loss.mean())  # from a term of nothing no step leads anywhere
    return np.concatenate([[np.log(max(law.floor, NEGLIGIBLE))], np.log(np.maximum(at_centre, least)), exponents])


def _refit(start: Array, logs: Array, loss: Array, weights: Array, *,
           free_floor: bool) -> tuple[Array, NDArray[np.bool_]]:
    """Weighted least squares of all resamples at a time.

    Args:
        start: [1 + 2k]; logs: centred logarithms of the quantities, [n, k]; weights: [R, n].

    Returns:
        ([R, 1 + 2k], which of them came to rest [R]).
    """
    k, resamples = logs.shape[1], len(weights)
    at = np.repeat(start[None], resamples, 0)
    parts, residual = _parts(at, logs, loss)
    error = (weights * residual**2).sum(1)
    damping = np.full(resamples, 1e-3)
    active = np.arange(resamples)
    for _ in range(STEPS):
        jacobian = np.concatenate([parts[active], -parts[active, :, 1:] * logs], 2)
        if not free_floor:
            jacobian[:, :, 0] = 0.0
        weighted = jacobian * weights[active][:, :, None]
        normal = weighted.transpose(0, 2, 1) @ jacobian
        diagonal = np.einsum("rii->ri", normal)
        diagonal += damping[active][:, None] * diagonal + 1e-30  # a view: this is what damps
        step = np.linalg.solve(normal, -(weighted * residual[active][:, :, None]).sum(1)[:, :, None])[:, :, 0]
        moved = at[active] + np.clip(step, -1.0, 1.0)
        moved[:, 1 + k:] = np.clip(moved[:, 1 + k:], *BOX)
        new_parts, new_residual = _parts(moved, logs, loss)
        new_error = (weights[active] * new_residual**2).sum(1)
        better = new_error <= error[active]
        gain = (error[active] - new_error) / np.maximum(error[active], 1e-300)
        rest = (better & (gain < 1e-9)) | (damping[active] > 1e10)
        taken = active[better]
        at[taken], parts[taken], residual[taken], error[taken] = (
            moved[better], new_parts[better], new_residual[better], new_error[better])
        damping[active] = np.where(better, np.maximum(damping[active] / 10, 1e-12), damping[active] * 10)
        active = active[~rest]
        if not len(active):
            break
    done = np.ones(resamples, dtype=bool)
    done[active] = False
    return at, done


def _parts(at: Array, logs: Array, loss: Array) -> tuple[Array, Array]:
    """(floor and terms [R, n, 1 + k], residuals [R, n]) of laws [R, 1 + 2k]."""
    k = logs.shape[1]
    terms = np.exp(np.clip(at[:, None, 1:1 + k] - at[:, None, 1 + k:] * logs[None], -700, 50))
    floor = np.broadcast_to(np.exp(at[:, :1])[:, :, None], (*terms.shape[:2], 1))
    parts = np.concatenate([floor, terms], 2)
    return parts, parts.sum(2) - loss
