"""Fits of a loss that falls as powers of several quantities, down to a floor:

    L = E + A N^-a + B D^-b            (N weights, D tokens; and + G T^-g where the length T of windows varies)

For given exponents the law is linear in its floor and its amplitudes. Variable projection uses that: it searches the
exponents only, and solves for the rest by least squares with no negative value. Huber's loss on the logarithms of the
losses, as Chinchilla was fitted, is the second opinion: where the two differ by more than their intervals, neither is
to be trusted far from the runs.

Legend: n runs, k axes (2 with N and D, 3 with T).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from scipy.stats import f as f_distribution

from hyena_dist.config.errors import ConfigError

Array = NDArray[np.float64]

BOX = (0.01, 3.0)
"""Exponents that are looked at. One that ends at a side of it is no finding."""
GRID = {1: 120, 2: 40, 3: 16}
"""Points of the first search along each exponent, by the number of axes."""
NEGLIGIBLE = 1e-6
"""A term whose largest value is below this share of the loss is absent."""
DELTA = 1e-3
"""Of Huber's loss, in log loss: residuals beyond it, 0.1 %, count linearly. As Chinchilla's."""


@dataclass(frozen=True)
class Law:
    """One fitted law."""

    axes: tuple[str, ...]
    """Names of the quantities, such as ("N", "D")."""
    floor: float
    """E, the loss that no size and no data gets below."""
    amplitudes: tuple[float, ...]
    exponents: tuple[float, ...]
    error: float
    """What was minimised: the sum of squared residuals, or of Huber's losses."""
    runs: int
    floor_given: bool = False
    """Whether E was given, not fitted."""
    starts: int = 1
    agree: int = 1
    """Of the starts of the search, how many ended where the best did."""

    def __call__(self, x: Array) -> Array:
        """Losses [n] at quantities [n, k]."""
        return self.floor + (np.array(self.amplitudes) * x ** -np.array(self.exponents)).sum(1)

    @property
    def parameters(self) -> int:
        """How many numbers were fitted."""
        return 2 * len(self.axes) + (not self.floor_given)


def check_runs(x: Array, loss: Array, axes: Sequence[str], *, floor: float | None = None) -> None:
    """Refuse what no law can be fitted to.

    Raises:
        ConfigError: fewer runs than the law has numbers, or a quantity that all runs have the same value of.
    """
    needed = 2 * len(axes) + (floor is None) + 1
    if len(loss) < needed:
        raise ConfigError(f"a law over {', '.join(axes)} needs at least {needed} finished runs, and there are "
                          f"{len(loss)}: finish more points of the sweep")
    for j, axis in enumerate(axes):
        if len(np.unique(np.round(np.log(x[:, j]), 3))) < 3:
            raise ConfigError(f"the runs have fewer than 3 values of {axis}: a law in it needs an axis of the sweep "
                              "over it")
    if floor is not None and floor >= loss.min():
        raise ConfigError(f"a floor of {floor:g} is not below the lowest loss, {loss.min():g}: give a smaller one")


def project(exponents: Sequence[float] | Array, x: Array, loss: Array,
            floor: float | None = None) -> tuple[Array, float]:
    """The best floor and amplitudes for given exponents, none negative.

    Args:
        x: [n, k], scaled to about 1; loss: [n].
        floor: E, where it is known.

    Returns:
        ([1 + k], floor first; the sum of squared residuals).
    """
    columns = [x[:, j] ** -exponent for j, exponent in enumerate(exponents)]
    if floor is None:
        matrix, target = np.column_stack([np.ones(len(loss)), *columns]), loss
    else:
        matrix, target = np.column_stack(columns), loss - floor
    scale = matrix.max(0)
    found, norm = nnls(matrix / scale, target)
    found = found / scale
    return (found if floor is None else np.array([floor, *found])), float(norm) ** 2


def variable_projection(x: Array, loss: Array, axes: Sequence[str], *, floor: float | None = None) -> Law:
    """Least squares on the losses: a grid over the exponents, refined from its five best places.

    Args:
        x: quantities [n, k]; loss: [n].
        floor: E, where it is known; None: fitted.

    Raises:
        ConfigError: as `check_runs`.
    """
    check_runs(x, loss, axes, floor=floor)
    centre = np.exp(np.log(x).mean(0))
    scaled = x / centre
    grid = np.geomspace(0.02, 2.0, GRID[len(axes)])
    starts = sorted((project(place, scaled, loss, floor)[1], place) for place in product(grid, repeat=len(axes)))[:5]
    ends = [refine(np.array(place), scaled, loss, floor) for _, place in starts]
    error, exponents = min(ends, key=lambda end: end[0])
    agree = sum(bool(np.abs(np.log(other / exponents)).max() < 1e-3) for _, other in ends)
    linear, _ = project(exponents, scaled, loss, floor)
    return Law(tuple(axes), float(linear[0]), tuple((linear[1:] * centre**exponents).tolist()),
               tuple(exponents.tolist()), error, len(loss), floor is not None, len(starts), agree)


def refine(start: Array, scaled: Array, loss: Array, floor: float | None = None,
           fixed: dict[int, float] | None = None) -> tuple[float, Array]:
    """From a start, the exponents of the least error, inside the box; those in `fixed` stay where they are put.

    Returns:
        (the sum of squared residuals, exponents [k]).
    """
    fixed = fixed or {}
    free = [j for j in range(len(start)) if j not in fixed]

    def whole(values: Array) -> Array:
        exponents = np.array(start, dtype=float)
        exponents[free] = np.clip(np.exp(values), *BOX)
        for j, value in fixed.items():
            exponents[j] = value
        return exponents

    if not free:
        return project(whole(np.empty(0)), scaled, loss, floor)[1], whole(np.empty(0))
    found = minimize(lambda values: project(whole(values), scaled, loss, floor)[1], np.log(start[free]),
                     method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14 * float(loss @ loss),
                                                    "maxiter": 2000})
    return float(found.fun), whole(found.x)


def huber(x: Array, loss: Array, axes: Sequence[str], *, floor: float | None = None) -> Law:
    """Huber's loss on log residuals, summed over the runs, by L-BFGS from a grid of starts.

    The sum, not the mean: the mean of small losses meets the optimizer's tolerance at once, which is how the first
    published constants came to be wrong (Besiroglu et al. 2024).

    Args:
        x: quantities [n, k]; loss: [n].
        floor: E, where it is known; None: fitted.

    Raises:
        ConfigError: as `check_runs`.
    """
    check_runs(x, loss, axes, floor=floor)
    k = len(axes)
    centre = np.log(x).mean(0)
    logs, target = np.log(x) - centre, np.log(loss)
    base = float(target.min())

    def objective(values: Array) -> tuple[float, Array]:
        parts = np.column_stack([np.full(len(loss), values[0]), values[1:1 + k] - values[1 + k:] * logs])
        top = parts.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(parts - top).sum(1))
        residual = total - target
        size = np.abs(residual)
        value = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
        slope = np.clip(residual, -DELTA, DELTA)[:, None] * np.exp(parts - total[:, None])
        gradient = np.concatenate([slope.sum(0), -(slope[:, 1:] * logs).sum(0)])
        if floor is not None:
            gradient[0] = 0.0
        return float(value) / DELTA**2, gradient / DELTA**2  # in units of delta: tolerances are relative to noise

    floors = [np.log(floor)] if floor is not None else (base - 1.0, base - 0.1)
    slopes = (0.2, 0.5, 1.0) if k < 3 else (0.2, 0.8)
    starts = [np.array(start) for start in product(floors, *[(base - 1.5,)] * k, *[slopes] * k)]
    ends = [minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(None, None)] * (1 + k) + [BOX] * k,
                     options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-9}) for start in starts]
    best = min(ends, key=lambda end: end.fun)
    agree = sum(bool(np.abs(end.x[1 + k:] - best.x[1 + k:]).max() < 1e-3 and end.fun <= best.fun * (1 + 1e-6))
                for end in ends)
    exponents = best.x[1 + k:]
    return Law(tuple(axes), float(np.exp(best.x[0])), tuple(np.exp(best.x[1:1 + k] + exponents * centre).tolist()),
               tuple(exponents.tolist()), float(best.fun) * DELTA**2, len(loss), floor is not None, len(starts), agree)


def threshold(law: Law, together: int = 1) -> float:
    """The sum of squared residuals up to which other values of `together` exponents are within their 95 % region."""
    left = max(law.runs - law.parameters, 1)
    return law.error * (1 + together / left * float(f_distribution.ppf(0.95, together, left)))


def profile_is_open(law: Law, x: Array, loss: Array, axis: int) -> str | None:
    """Why an exponent of a law of `variable_projection` is not identified: its profile is flat out to an end of the
    box, or the law without its term is as good. None: the profile is closed on both sides."""
    floor = law.floor if law.floor_given else None
    scaled = x / np.exp(np.log(x).mean(0))
    limit = threshold(law)
    start = np.clip(np.array(law.exponents), *BOX)
    for end, word in zip(BOX, ("small", "large"), strict=True):
        if refine(start, scaled, loss, floor, {axis: end})[0] <= limit:
            return f"the fit is as good with any {word} exponent, {end:g} for one"
    others = [j for j in range(len(law.axes)) if j != axis]
    if others and refine(start[others], scaled[:, others], loss, floor)[0] <= limit:
        return f"the fit without a term in {law.axes[axis]} is as good"
    return None


def profile(law: Law, x: Array, loss: Array, first: Array, second: Array) -> Array:
    """Sums of squared residuals over a grid of the first two exponents, with the others at the best of five
    values around the law's: [p, q]."""
    floor = law.floor if law.floor_given else None
    scaled = x / np.exp(np.log(x).mean(0))
    others = [np.clip(exponent * np.geomspace(1 / 4, 4, 5), *BOX) for exponent in law.exponents[2:]]
    return np.array([[min(project((a, b, *rest), scaled, loss, floor)[1] for rest in product(*others))
                      for b in second] for a in first])


def profile_line(law: Law, x: Array, loss: Array, exponents: Array) -> Array:
    """Sums of squared residuals of a law of one quantity over its exponent: [p]."""
    floor = law.floor if law.floor_given else None
    scaled = x / np.exp(np.log(x).mean(0))
    return np.array([project((exponent,), scaled, loss, floor)[1] for exponent in exponents])
