"""The text of a scaling report, for somebody who plans a training run and has not fitted a law before."""

from collections.abc import Iterable, Sequence

import numpy as np

from hyena_dist.tasks.scaling.analysis import Analysis, Fitted, epochs_of
from hyena_dist.tasks.scaling.bootstrap import Interval
from hyena_dist.tasks.scaling.optimum import Allocation
from hyena_dist.tasks.scaling.points import lengths_at_fixed_compute
from hyena_dist.tasks.scaling.shapes import depth_map
from hyena_dist.train.wording import amount

CAPTIONS = {
    "loss.png": "Each dot is a run. Lines, where there is a law, are the law at five values of the other quantity.",
    "optimum.png": "Best weights and tokens by budget, beside published optima. Those are of other data, other "
                   "tokenizers and other losses: a comparison of slopes, not of heights.",
    "isoflops.png": "Runs of one budget. The lowest points of parabolas are biased where the two exponents differ, or "
                    "where the sizes are far apart or not centred: look at them, and do not plan by them.",
    "profile.png": "How bad the fit becomes with other exponents. A closed valley is a finding, a long or open one is "
                   "not.",
    "residuals.png": "What the law leaves unexplained. A trend or a bend means that the law is not the right one.",
    "depth.png": "The lowest loss of every depth at every length, a mean where runs differ in the seed alone. Cells "
                 "differ in size, and may differ in width and tokens.",
    "metric.png": "A score of another kind beside the loss. It need not follow the loss, nor the size.",
}


def markdown(found: Analysis, title: str, pictures: Sequence[str]) -> str:
    """The whole of report.md; `pictures` are the names of those that were drawn."""
    parts = [f"# {title}", _in_short(found), *_warned(found), *_used(found), *_law(found, pictures),
             *_budgets(found, pictures), *_shapes(found, pictures),
             "## Files\n\n`points.csv` has every run, what the law says of it, and why it was left out if it was; "
             "`laws.csv` has every fitted number at full precision."]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _picture(name: str, pictures: Sequence[str]) -> str:
    return f"![{name.removesuffix('.png')}]({name})\n\n*{CAPTIONS[name]}*" if name in pictures else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _between(interval: Interval, form: str = ".3f") -> str:
    return (f"{interval.low:{form}} to {interval.high:{form}}" if interval.identified
            else f"**not identified**: {interval.reason}")


def _amounts(interval: Interval) -> str:
    return f"{amount(interval.low)} to {amount(interval.high)}" if interval.identified else "not identified"


def _in_short(found: Analysis) -> str:
    best = min(found.points, key=lambda point: point.loss)
    runs = "1 finished run" if len(found.points) == 1 else f"{len(found.points)} finished runs"
    lines = [runs + (f", and {len(found.left)} left out by rule" if found.left else "")
             + f". The lowest validation loss is {best.loss:.4f} nats, a perplexity of "
             f"{np.exp(best.loss):.4f}, of run {best.label}: {amount(best.params)} weights, {amount(best.tokens)} "
             "tokens."]
    if found.main is None:
        lines.append(f"There is no law: {found.no_fit}.")
    elif not found.main.trust.identified:
        lines.append("The runs do not say how the loss falls with "
                     + " or with ".join(_axis(axis) for axis, interval in zip(
                         found.main.law.axes, found.main.trust.exponents, strict=True) if not interval.identified)
                     + ": the exponents below are not identified. What the runs say of each other still holds; what "
                       "they say of larger ones does not.")
    if found.allocation is not None and found.allocation.size_interval.identified:
        a, b = found.allocation, found.allocation.rows[-1]
        lines.append(f"For ten times the operations the best model has {10**a.size_power:.1f} times the weights and "
                     f"sees {10**a.tokens_power:.1f} times the tokens. At {b.flops:.2g} operations that is "
                     f"{_amounts(b.size_interval)} weights and {_amounts(b.tokens_interval)} tokens.")
    return "## In short\n\n" + " ".join(lines)


def _axis(axis: str) -> str:
    return {"N": "size", "D": "tokens", "T": "length"}[axis]


def _warned(found: Analysis) -> Iterable[str]:
    if found.warnings:
        yield "## Warnings\n\n" + "\n".join(f"- {warning}" for warning in found.warnings)


def _used(found: Analysis) -> Iterable[str]:
    def span(values: Sequence[float | None], unit: str = "") -> str:
        known = [value for value in values if value is not None]
        return "not recorded" if not known else " to ".join(
            dict.fromkeys([amount(min(known)), amount(max(known))])) + unit

    points = found.points
    rows = [("runs", str(len(points))), ("weights N", span([p.params for p in points])),
            ("training tokens D", span([p.tokens for p in points])),
            ("operations C", " to ".join(f"{value:.3g}" for value in sorted(
                {min(c), max(c)})) if (c := [p.flops for p in points if p.flops]) else "not recorded"),
            ("window length T", span([p.seq_len for p in points])), ("layers", span([p.num_layers for p in points])),
            ("passes over the data", " to ".join(f"{value:.3g}" for value in sorted({min(e), max(e)}))
             if (e := [x for p in points if (x := epochs_of(p)) is not None]) else "not recorded"),
            ("validation loss", " to ".join(f"{value:.4f}" for value in sorted(
                {min(p.loss for p in points), max(p.loss for p in points)})))]
    families = len({point.family for point in points})
    if families < len(points):
        rows.insert(1, ("independent runs", f"{families}: the others are forks of them"))
    yield "## Runs\n\n" + _table(("what", "values"), rows)
    yield (("Left out, each by a rule that does not look at its loss:\n\n"
            + _table(("run", "why"), [(left.id, left.reason) for left in found.left]))
           if found.left else "No run was left out.")


def _law(found: Analysis, pictures: Sequence[str]) -> Iterable[str]:
    yield "## Loss by size, tokens and length"
    if found.main is None:
        yield f"There is no law: {found.no_fit}."
    else:
        terms = {"N": "A N^-a", "D": "B D^-b", "T": "G T^-g"}
        yield (f"`L = E + {' + '.join(terms[axis] for axis in found.main.law.axes)}`\n\nE is the loss that is left "
               "however large the model and the data are: what cannot be predicted. An exponent says how fast a term "
               "falls: with 0.3, ten times as much leaves half of it. An interval would hold the true number in 95 of "
               "100 such sweeps, if the law is the right one.")
        for fitted in found.fits:
            yield f"### {fitted.name[0].upper()}{fitted.name[1:]} ({fitted.law.runs})"
            yield _numbers(fitted)
            yield _methods(fitted)
    yield from (_picture(name, pictures) for name in ("loss.png", "profile.png", "residuals.png"))


def _numbers(fitted: Fitted) -> str:
    law, second, trust = fitted.law, fitted.second, fitted.trust
    letters = {"N": ("A", "a"), "D": ("B", "b"), "T": ("G", "g")}
    rows = [("E", f"{law.floor:.4f}", "given, not fitted" if law.floor_given else _between(trust.floor, ".4f"),
             f"{second.floor:.4f}")]
    for j, axis in enumerate(law.axes):
        rows += [(f"{letters[axis][1]}, exponent of {_axis(axis)}", f"{law.exponents[j]:.4f}",
                  _between(trust.exponents[j]), f"{second.exponents[j]:.4f}"),
                 (f"{letters[axis][0]}, amplitude", f"{law.amplitudes[j]:.4g}",
                  _between(trust.amplitudes[j], ".3g") if trust.exponents[j].identified else "",
                  f"{second.amplitudes[j]:.4g}")]
    return _table(("number", "least squares", "95 % interval", "Huber's loss on logarithms"), rows)


def _methods(fitted: Fitted) -> str:
    spread = 100 * float(np.sqrt(np.mean(fitted.residuals**2)))
    return (f"Least squares on the losses, by variable projection: {fitted.law.agree} of {fitted.law.starts} refined "
            f"starts ended in the same place. Huber's loss (delta 0.001, summed over the runs) by L-BFGS: "
            f"{fitted.second.agree} of {fitted.second.starts}. Runs lie {spread:.2g} % from the law (root mean "
            f"square). Intervals are of {len(fitted.trust.laws):,} resamples of the runs.")


def _budgets(found: Analysis, pictures: Sequence[str]) -> Iterable[str]:
    allocation = found.allocation
    if allocation is not None:
        yield "## Best size for a budget"
        yield _cost(allocation)
        yield _table(("operations C", "best weights N", "95 % interval", "best tokens D", "95 % interval",
                      "tokens a weight", "loss"),
                     [(f"{row.flops:.3g}" + (f" ({row.beyond:.3g} times measured)" if row.beyond > 1.001 else ""),
                       amount(row.size), _amounts(row.size_interval), amount(row.tokens), _amounts(row.tokens_interval),
                       f"{row.tokens / row.size:.3g}", f"{row.loss:.4f}") for row in allocation.rows])
        yield (f"N* grows as C^{allocation.size_power:.3f} ({_between(allocation.size_interval)}), D* as "
               f"C^{allocation.tokens_power:.3f} ({_between(allocation.tokens_interval)}). Published, by parabolas: "
               "Evo 1's Hyena .504 and .499, StripedHyena .483 and .539, Transformer++ .552 and .551, all on DNA.")
    else:
        yield ("" if found.main is None else "## Best size for a budget\n\nNot computed: it needs a law with a "
               "term in weights and one in tokens, and the exact operations of runs of three sizes.")
    yield _picture("optimum.png", pictures)
    if found.biased is not None:
        yield ("Biased, for comparison only: through the lowest points of parabolas N* grows as "
               f"C^{found.biased[0]:.3f}, D* as C^{found.biased[1]:.3f}.")
    yield _picture("isoflops.png", pictures)


def _cost(allocation: Allocation) -> str:
    cost = allocation.cost
    length = f" at windows of {cost.length:,.0f} tokens" if cost.length > 1 else ""
    return (f"A token costs {cost.factor:.4g} N^{cost.power:.3f} operations{length}, as the runs' own exact counts "
            f"say, within {100 * cost.worst:.2g} %; 6 N would leave out what is not in the weights.")


def _shapes(found: Analysis, pictures: Sequence[str]) -> Iterable[str]:
    if groups := lengths_at_fixed_compute(found.points):
        lengths = sorted({length for _, _, losses in groups for length in losses})
        yield ("## Length at fixed compute\n\nRuns of one size and one budget: what is spent on longer windows is not "
               "spent on more of them.")
        yield _table(("operations C", "weights", *(f"length {length:,}" for length in lengths)),
                     [(f"{flops:.3g}", amount(size), *(f"{losses[length]:.4f}" if length in losses else "-"
                                                       for length in lengths)) for flops, size, losses in groups])
    cells = depth_map(found.points)
    if cells is not None:
        depths, lengths, losses = cells
        yield "## Depth and length"
        yield _table(("layers", *(f"length {length:,}" for length in lengths)),
                     [(str(depth), *("-" if np.isnan(value) else f"{value:.4f}" for value in losses[i]))
                      for i, depth in enumerate(depths)])
        yield _picture("depth.png", pictures)
    scored = sorted((point for point in found.points if point.metric is not None), key=lambda point: point.loss)
    if scored:
        yield f"## {scored[0].metric_name} beside the loss"
        yield _table(("run", "weights", "loss", scored[0].metric_name),
                     [(p.label, amount(p.params), f"{p.loss:.4f}", f"{p.metric:.4f}") for p in scored])
        yield _picture("metric.png", pictures)
