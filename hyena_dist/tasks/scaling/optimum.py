"""The best size and the best number of tokens for a budget of operations, from a fitted law and the runs' own costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hyena_dist.tasks.scaling.bootstrap import Interval, Trust
from hyena_dist.tasks.scaling.fit import Array, Law
from hyena_dist.tasks.scaling.points import Point, groups_by_flops

POINTS_OF_A_CURVE = 60
LEAST_OF_A_PARABOLA = 4
"""Sizes of one budget through which a parabola is drawn: three would be met exactly."""


@dataclass(frozen=True)
class Cost:
    """Operations of training on one token, as a power of the size: C / D = factor N^power (T / length)^of_length."""

    factor: float
    power: float
    of_length: float
    length: float
    """Length of windows, in tokens, that the factor is of: the longest that was trained at; 1 where none is known."""
    worst: float
    """The largest relative error of this over the runs that it was fitted to."""

    def per_token(self, size: Array, length: float | None = None) -> Array:
        """Operations a token at sizes [n]."""
        return self.factor * size**self.power * ((length or self.length) / self.length) ** self.of_length


@dataclass(frozen=True)
class Optimum:
    """The best run of one budget by a law."""

    flops: float
    size: float
    tokens: float
    loss: float
    size_interval: Interval
    tokens_interval: Interval
    beyond: float
    """How many times the largest budget that was measured."""


@dataclass(frozen=True)
class Allocation:
    """Best sizes and tokens by budget, as powers of it: N* ~ C^size_power, D* ~ C^tokens_power."""

    size_power: float
    tokens_power: float
    size_interval: Interval
    tokens_interval: Interval
    cost: Cost
    rows: tuple[Optimum, ...]
    """Of the budgets that were asked about."""
    curve: tuple[Optimum, ...]
    """Of many budgets from the smallest to the largest of runs and rows, for pictures."""


@dataclass(frozen=True)
class Parabola:
    """A parabola of the loss in the logarithm of the size, through the runs of one budget: approach 2 of Chinchilla."""

    flops: float
    coefficients: Array
    """Of the square, the first power and 1, in log N."""
    sizes: Array
    losses: Array
    size: float | None
    """At its lowest point; None: it has none among the sizes that were trained, so the optimum is not bracketed."""
    tokens: float | None


def fit_cost(points: Sequence[Point]) -> Cost | None:
    """Operations a token from the points' own exact ones; None where fewer than three sizes have them.

    6 N D is not used: it leaves out the FFTs, the filters and attention's products, which count most in small models.
    """
    known = [point for point in points if point.flops]
    size = np.array([point.params for point in known])
    if len(np.unique(size)) < 3:
        return None
    per_token = np.log(np.array([point.flops or 0.0 for point in known]) / np.array([point.tokens for point in known]))
    lengths = np.array([point.seq_len or 1.0 for point in known])
    longest = float(lengths.max())
    columns = [np.ones(len(known)), np.log(size)]
    if len(np.unique(lengths)) > 1 and all(point.seq_len for point in known):
        columns.append(np.log(lengths / longest))
    matrix = np.column_stack(columns)
    found, *_ = np.linalg.lstsq(matrix, per_token, rcond=None)
    worst = float(np.abs(np.expm1(matrix @ found - per_token)).max())
    return Cost(float(np.exp(found[0])), float(found[1]), float(found[2]) if len(found) > 2 else 0.0, longest, worst)


def _best(laws: Array, cost: Cost, flops: Array, k: int) -> tuple[Array, Array]:
    """(best sizes, best tokens), each [R, budgets], of laws [R, 1 + 2k] whose first axes are N and D.

    With C = c N^q D the law is A N^-a + B (C / c)^-b N^(q b), whose derivative in N is 0 at one place."""
    amplitude_n, amplitude_d = laws[:, 1, None], laws[:, 2, None]
    a, b = laws[:, 1 + k, None], laws[:, 2 + k, None]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_size = (np.log(a * amplitude_n / (cost.power * b * amplitude_d))
                    + b * np.log(flops / cost.factor)) / (a + cost.power * b)
    size = np.exp(log_size)
    return size, flops / cost.per_token(size)


def allocate(law: Law, trust: Trust, cost: Cost, budgets: Sequence[float], *, smallest: float,
             largest: float) -> Allocation | None:
    """Best sizes and tokens for budgets at the longest windows; None where the law has no term in one of the two.

    Args:
        smallest, largest: budgets that were measured.
    """
    if min(law.amplitudes[:2]) <= 0 or cost.power <= 0:
        return None
    reason = next((f"the exponent of {axis} is not" for axis, interval in zip("ND", trust.exponents[:2], strict=True)
                   if interval.reason), "")
    k = len(law.axes)
    (a, b), (all_a, all_b) = law.exponents[:2], trust.laws[:, 1 + k:3 + k].T
    total, all_total = a + cost.power * b, all_a + cost.power * all_b
    dense = np.geomspace(min(smallest, *budgets), max(largest, *budgets), POINTS_OF_A_CURVE).tolist()
    return Allocation(b / total, a / total, _ends(trust, all_b / all_total, reason),
                      _ends(trust, all_a / all_total, reason), cost,
                      _optima(law, trust, cost, budgets, largest, reason),
                      _optima(law, trust, cost, sorted([*dense, smallest, largest]), largest, reason))


def _optima(law: Law, trust: Trust, cost: Cost, budgets: Sequence[float], largest: float,
            reason: str) -> tuple[Optimum, ...]:
    k, flops = len(law.axes), np.array(budgets, dtype=float)
    (sizes,), (tokens,) = _best(np.array([[law.floor, *law.amplitudes, *law.exponents]]), cost, flops, k)
    all_sizes, all_tokens = _best(trust.laws, cost, flops, k)
    x = np.column_stack([sizes, tokens, *[np.full(len(flops), cost.length)] * (k - 2)])
    return tuple(Optimum(float(flops[i]), float(sizes[i]), float(tokens[i]), float(loss),
                         _ends(trust, all_sizes[:, i], reason), _ends(trust, all_tokens[:, i], reason),
                         float(flops[i] / largest)) for i, loss in enumerate(law(x)))


def _ends(trust: Trust, values: Array, reason: str) -> Interval:
    found = trust.interval(np.nan_to_num(values, nan=0.0))
    return Interval(found.low, found.high, reason)


def parabolas(points: Sequence[Point]) -> list[Parabola]:
    """One for each budget of enough sizes, lowest budget first."""
    found = []
    for flops, group in groups_by_flops(points).items():
        best: dict[float, Point] = {}  # of runs of one size: others differ in something that N and D do not say
        for point in group:
            size = round(float(np.log(point.params)), 3)
            if size not in best or point.loss < best[size].loss:
                best[size] = point
        if len(best) < LEAST_OF_A_PARABOLA:
            continue
        chosen = [best[size] for size in sorted(best)]
        sizes, losses = np.array([p.params for p in chosen]), np.array([p.loss for p in chosen])
        tokens = np.array([p.tokens for p in chosen])
        logs = np.log(sizes)
        middle = logs.mean()
        square, slope, rest = np.polyfit(logs - middle, losses, 2)
        coefficients = np.array([square, slope - 2 * square * middle, rest - slope * middle + square * middle**2])
        lowest = middle - slope / (2 * square) if square > 0 else np.inf
        inside = bool(logs[0] < lowest < logs[-1])
        found.append(Parabola(flops, coefficients, sizes, losses, float(np.exp(lowest)) if inside else None,
                              float(np.exp(np.interp(lowest, logs, np.log(tokens)))) if inside else None))
    return found


def biased_powers(found: Sequence[Parabola]) -> tuple[float, float] | None:
    """N* ~ C^a and D* ~ C^b through the parabolas' lowest points; None with fewer than three of them.

    Biased where the two exponents of the law differ, where sizes are far apart, or not centred on the optimum."""
    inside = [parabola for parabola in found if parabola.size and parabola.tokens]
    if len(inside) < 3:
        return None
    logs = np.log([parabola.flops for parabola in inside])
    return (float(np.polyfit(logs, np.log([parabola.size or 1.0 for parabola in inside]), 1)[0]),
            float(np.polyfit(logs, np.log([parabola.tokens or 1.0 for parabola in inside]), 1)[0]))
