"""The best learning rate of each width, and how it moves: lr* ~ width^-c, measured.

The loss is a parabola in the logarithm of the learning rate near its lowest point. All parabolas share one spread of
the runs around them, so that five rates a width are enough to say how well a lowest point is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as t_distribution

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.scaling.bootstrap import Interval
from hyena_dist.tasks.scaling.fit import Array
from hyena_dist.tasks.scaling.pictures import LAW, colours, figure
from hyena_dist.tasks.scaling.points import Point

REACH = 4.05
"""Rates further from the best of the grid than this factor are drawn, not fitted: far from its lowest point the loss is
no parabola."""
LEAST = 4
"""Rates that a parabola goes through."""


@dataclass(frozen=True)
class Curve:
    """The losses of one width."""

    width: float
    rates: Array
    losses: Array
    """[n], every rate that was tried, lowest first."""
    fitted: Array
    """Which of them the parabola goes through, [n] bool."""
    coefficients: Array
    """Of its square, first power and 1, in log lr; empty: too few rates."""
    lowest: float
    """The best rate by the parabola; nan where there is none."""
    error: float
    """Standard error of log(lowest)."""
    interval: Interval


@dataclass(frozen=True)
class Rule:
    """lr* = rate (width / reference)^-power."""

    curves: tuple[Curve, ...]
    power: float
    interval: Interval
    rate: float
    reference: float
    stays: bool
    """Whether the interval holds 0: the measurement does not tell the rule from no rule."""


def learning_rate_rule(points: Sequence[Point]) -> Rule:
    """Fit a parabola to each width, and a power law through their lowest points.

    Raises:
        ConfigError: no width has several rates.
    """
    by_width: dict[float, dict[float, list[float]]] = {}
    for point in points:
        if point.hidden_size and point.lr:
            by_width.setdefault(point.hidden_size, {}).setdefault(point.lr, []).append(point.loss)
    chosen = {width: _chosen(rates) for width, rates in sorted(by_width.items())}
    if all(len(rates) < LEAST for rates, _, _ in chosen.values()):
        raise ConfigError(f"no width has {LEAST} learning rates: a rule needs an axis of the sweep over optim.lr, and "
                          "one over model.hidden_size")
    enough = {width: parts for width, parts in chosen.items() if parts[2].sum() >= LEAST}
    fits = {width: _parabola(np.log(rates[near]), losses[near]) for width, (rates, losses, near) in enough.items()}
    freedom = max(sum(int(enough[width][2].sum()) - 3 for width in enough), 1)
    spread = sum(fit[2] for fit in fits.values()) / freedom
    quantile = float(t_distribution.ppf(0.975, freedom))
    curves = tuple(_curve(width, parts, fits.get(width), spread, quantile) for width, parts in chosen.items())
    return _rule(curves, quantile)


def _chosen(rates: dict[float, list[float]]) -> tuple[Array, Array, Array]:
    """(rates, mean losses over seeds, which are near the best), by rate."""
    values = np.array(sorted(rates))
    losses = np.array([np.mean(rates[rate]) for rate in values])
    best = values[losses.argmin()]
    return values, losses, (values <= best * REACH) & (values >= best / REACH)


def _parabola(logs: Array, losses: Array) -> tuple[Array, Array, float]:
    """(coefficients, the inverse of the normal matrix, the sum of squared residuals)."""
    matrix = np.column_stack([logs**2, logs, np.ones(len(logs))])
    coefficients, *_ = np.linalg.lstsq(matrix, losses, rcond=None)
    return coefficients, np.linalg.inv(matrix.T @ matrix), float(((matrix @ coefficients - losses) ** 2).sum())


def _curve(width: float, parts: tuple[Array, Array, Array], fit: tuple[Array, Array, float] | None, spread: float,
           quantile: float) -> Curve:
    rates, losses, near = parts
    none = Interval(np.nan, np.nan, "")
    if fit is None:
        at_end = losses.argmin() in (0, len(losses) - 1)
        why = ("its best is at an end of the rates tried" if at_end else
               f"{int(near.sum())} rates within a factor of {REACH - 0.05:g} of its best, and {LEAST} are needed")
        return Curve(width, rates, losses, near, np.empty(0), np.nan, np.nan, Interval(none.low, none.high, why))
    coefficients, inverse, _ = fit
    square, slope, _ = coefficients
    if square <= 0:
        return Curve(width, rates, losses, near, coefficients, np.nan, np.nan,
                     Interval(none.low, none.high, "the losses have no lowest point"))
    place = -slope / (2 * square)
    gradient = np.array([slope / (2 * square**2), -1 / (2 * square), 0.0])
    error = float(np.sqrt(max(spread * gradient @ inverse @ gradient, 0.0)))
    reason = "" if np.log(rates[0]) < place < np.log(rates[-1]) else "its lowest point is outside the rates tried"
    return Curve(width, rates, losses, near, coefficients, float(np.exp(place)), error,
                 Interval(float(np.exp(place - quantile * error)), float(np.exp(place + quantile * error)), reason))


def _rule(curves: tuple[Curve, ...], quantile: float) -> Rule:
    """A weighted straight line through the logarithms of the lowest points."""
    good = [curve for curve in curves if curve.interval.identified]
    if len(good) < 3:
        why = f"{len(good)} widths have their lowest point among the rates tried, and 3 are needed"
        return Rule(curves, np.nan, Interval(np.nan, np.nan, why), np.nan, np.nan, False)
    logs, places = np.log([curve.width for curve in good]), np.log([curve.lowest for curve in good])
    weights = 1 / np.maximum([curve.error for curve in good], 1e-6) ** 2
    middle = float((weights * logs).sum() / weights.sum())
    across = float((weights * (logs - middle) ** 2).sum())
    slope = float((weights * (logs - middle) * places).sum() / across)
    level = float((weights * places).sum() / weights.sum())
    scatter = float((weights * (places - level - slope * (logs - middle)) ** 2).sum()) / (len(good) - 2)
    error = np.sqrt(max(scatter, 1.0) / across)  # wider where the points do not lie on a line
    interval = Interval(-slope - quantile * error, -slope + quantile * error)
    return Rule(curves, -slope, interval, float(np.exp(level)), float(np.exp(middle)),
                interval.low <= 0 <= interval.high)


def describe(rule: Rule) -> str:
    """The rule as text, with a table of the widths."""
    lines = ["| width | best of the grid | lowest of the parabola | 95 % interval |", "| --- | --- | --- | --- |"]
    for curve in rule.curves:
        found = curve.interval
        lines.append(f"| {curve.width:,.0f} | {curve.rates[curve.losses.argmin()]:.3g} | "
                     + (f"{curve.lowest:.3g} | {found.low:.3g} to {found.high:.3g} |" if found.identified else
                        f"none | not bracketed: {found.reason} |"))
    if not rule.interval.identified:
        said = f"There is no rule: {rule.interval.reason}."
    else:
        said = (f"lr* = {rule.rate:.3g} (width / {rule.reference:.0f})^-{rule.power:.3f}, the exponent within "
                f"{rule.interval.low:.3f} to {rule.interval.high:.3f} (95 %). "
                + ("0 is among them: these runs do not tell a rule from a rate that stays where it is." if rule.stays
                   else "The best rate moves with the width.").replace("^--", "^+"))
    return "\n".join(["# Learning rate across widths", "", said.replace("^--", "^"), "", *lines, ""])


def draw_rates(rule: Rule, path: Path) -> None:
    """The losses of every width against the learning rate, and the lowest points against the width.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    widths = np.array([curve.width for curve in rule.curves])
    norm, cmap = colours(np.append(widths, 1.3 * widths.max()))
    with figure(path, 2, width=5.4, height=4.2) as (_, (left, right)):
        for curve in rule.curves:
            colour = cmap(norm(curve.width))
            left.plot(curve.rates[curve.fitted], curve.losses[curve.fitted], "o", color=colour, markersize=5,
                      label=f"width {curve.width:,.0f}")
            left.plot(curve.rates[~curve.fitted], curve.losses[~curve.fitted], "o", color=colour, markersize=5,
                      markerfacecolor="none")
            if len(curve.coefficients):
                near = curve.rates[curve.fitted]
                line = np.geomspace(near[0], near[-1], 100)
                left.plot(line, np.polyval(curve.coefficients, np.log(line)), color=colour, linewidth=1.1)
            if curve.interval.identified:
                left.plot(curve.lowest, np.polyval(curve.coefficients, np.log(curve.lowest)), "*", color=LAW,
                          markersize=12, markeredgecolor="white", zorder=5)
                right.plot([curve.width] * 2, [curve.interval.low, curve.interval.high], color=colour, linewidth=2)
                right.plot(curve.width, curve.lowest, "*", color=LAW, markersize=12, markeredgecolor="white", zorder=5)
        if rule.interval.identified:
            line = np.geomspace(widths.min(), widths.max(), 50)
            right.plot(line, rule.rate * (line / rule.reference) ** -rule.power, color=LAW, linewidth=1.4,
                       label=f"lr* ~ width^{-rule.power:.2f} ({-rule.interval.high:.2f} to {-rule.interval.low:.2f})")
            right.legend()
        left.set(xscale="log", xlabel="learning rate", ylabel="validation loss [nats a token]",
                 title="Loss by learning rate (hollow: not fitted)")
        right.set(xscale="log", yscale="log", xlabel="width", ylabel="best learning rate",
                  title="Lowest points with their 95 % intervals")
        right.set_xticks(widths, [f"{width:,.0f}" for width in widths])
        lowest = [curve.lowest for curve in rule.curves if curve.interval.identified]
        right.set_yticks(lowest, [f"{rate:.2g}" for rate in lowest])
        right.minorticks_off()
        left.legend(fontsize=8)
