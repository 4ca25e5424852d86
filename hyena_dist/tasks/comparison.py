"""What several seeds say together, and beside what: one summary, as lines and as a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

COMMON = ("task", "classes", "from", "trained", "pooling", "rc", "judged_on", "notes")
OTHERS = {"kmers": "k-mer regression", "cnn": "CNN, from nothing", "scratch": "this model, from nothing",
          "mean": "mean of the training labels"}
"""What stands beside a result, in the words of a table."""


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, deviation (of a sample, n - 1) and range of each metric on the split that was judged, the same of each
    baseline, and the seeds whose model says one class of everything."""
    first = results[0]
    judged = first["judged_on"]
    baselines = {name: _spreads([result["baselines"][name]["scores"][judged] for result in results])
                 for name in first["baselines"]}
    collapsed = [result["seed"] for result in results if result["scores"][judged]["collapsed"]]
    return {**{key: first[key] for key in COMMON},
            "metrics": _spreads([result["scores"][judged] for result in results]), "baselines": baselines,
            "collapsed_seeds": collapsed, "seeds": list(results)}


def _spreads(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each metric its spread over the seeds."""
    return {name: spread([of_seed[name] for of_seed in scores]) for name in scores[0]
            if name not in ("sequences", "collapsed")}


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Of those values that there are."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "deviation": None, "lowest": None, "highest": None, "seeds": 0}
    mean = math.fsum(found) / len(found)
    deviation = (math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1))
                 if len(found) > 1 else None)
    return {"mean": mean, "deviation": deviation, "lowest": min(found), "highest": max(found), "seeds": len(found)}


def in_words(whole: Mapping[str, Any]) -> list[str]:
    """A summary as lines for a person."""
    lines = []
    for name, found in whole["metrics"].items():
        beside = [f"{kind} {number(metrics[name]['mean'])}" for kind, metrics in whole["baselines"].items()]
        spread = (f", from {number(found['lowest'])} to {number(found['highest'])} over {len(whole['seeds'])} seeds"
                  if len(whole["seeds"]) > 1 else "")
        lines.append(f"{whole['judged_on']} {name}: {number(found['mean'])}{spread}"
                     + (f"; beside it {', '.join(beside)}" if beside else ""))
    if whole["collapsed_seeds"]:
        seeds = ", ".join(map(str, whole["collapsed_seeds"]))
        lines.append(f"seeds {seeds} collapsed: the model says the same of everything")
    return lines


def number(value: float | None) -> str:
    """A metric for a person; None: there is none."""
    return "none" if value is None else f"{value:.4f}"


def _rows(whole: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the result, then what stands beside it; a mean and, of several seeds, its deviation."""
    metrics = list(whole["metrics"])

    def cell(found: Mapping[str, Any]) -> str:
        return number(found["mean"]) + ("" if found["deviation"] is None else f" ± {found['deviation']:.4f}")

    def row(name: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return [name, *(cell(found[metric]) for metric in metrics)]

    own = f"{whole['from'] or 'from nothing'}, trained: {whole['trained']}"
    others = [row(OTHERS.get(name, name), found) for name, found in whole["baselines"].items()]
    return [f"on {whole['judged_on']}", *metrics], [row(own, whole["metrics"]), *others]


def markdown(whole: Mapping[str, Any]) -> str:
    """The table of a summary, with what has to be said of it."""
    header, rows = _rows(whole)
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
             for row in (header, ["---"] * len(header), *rows)]
    count = len(whole["seeds"])
    lines += ["", f"{count} seeds; after a ± stands the deviation over them (n - 1)." if count > 1 else "1 seed."]
    lines += [f"- {note}" for note in [*whole["notes"], *in_words(whole)[len(whole["metrics"]):]]]
    return "\n".join(lines) + "\n"


def on_screen(whole: Mapping[str, Any]) -> Table:
    """What the table says, for a terminal of 80 columns: a row for each metric, of fewer digits, and what stands beside
    the result by its name in finetune.baselines."""
    columns = {"this run": whole["metrics"], **whole["baselines"]}
    table = Table(f"on {whole['judged_on']}", *(Column(name, justify="right") for name in columns), show_edge=False,
                  pad_edge=False)
    for metric in whole["metrics"]:
        cells = [_short(found[metric]) for found in columns.values()]
        table.add_row(metric.replace("mean_squared_error", "mse"), *cells)
    return table


def _short(found: Mapping[str, Any]) -> str:
    """A mean and, of several seeds, its deviation, in as few characters as say enough."""
    said = [f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"
            for value in (found["mean"], found["deviation"]) if value is not None]
    return " ± ".join(said) or "none"
