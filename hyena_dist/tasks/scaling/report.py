"""The report on a sweep: report.md for people, points.csv and laws.csv at full precision, and pictures."""

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyena_dist.runtime.files import write_whole, writing
from hyena_dist.tasks.scaling.analysis import Analysis, Fitted, analyse, epochs_of
from hyena_dist.tasks.scaling.bootstrap import Interval
from hyena_dist.tasks.scaling.points import read_points
from hyena_dist.tasks.scaling.prose import markdown

logger = logging.getLogger(__name__)

POINT_COLUMNS = ("id", "params", "tokens", "flops", "budget", "seq_len", "num_layers", "hidden_size", "lr", "steps",
                 "seed", "epochs", "unique_tokens", "seconds", "mfu", "loss", "metric", "family")


def report(points: Iterable[Mapping[str, Any]], out: Path, *, title: str = "", min_steps: int = 0,
           floor: float | None = None, budgets: Sequence[float] = ()) -> tuple[Analysis, list[Path]]:
    """Write the report on the points of a sweep.

    Args:
        points: rows, as `points.read_points` has them.
        out: a directory, which is made.
        title: of the report; empty: the name of `out`.
        min_steps, floor, budgets: as `analysis.analyse` takes them.

    Returns:
        (what was found, the files that were written). Without matplotlib there are no pictures, and a warning.

    Raises:
        ConfigError: no finished run is left, or a row or an argument makes no sense.
        OSError: a file cannot be written.
    """
    from hyena_dist.tasks.scaling.pictures import draw_all

    found = analyse(points, min_steps=min_steps, floor=floor, budgets=budgets)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    pictures = []
    try:
        pictures = draw_all(found, out)
    except ImportError:
        logger.warning("no pictures: matplotlib is missing; install it with pip install 'hyena-dist[plots]'")
    texts = {"report.md": markdown(found, title or out.resolve().name, [path.name for path in pictures]),
             "points.csv": _csv(_point_rows(found)), "laws.csv": _csv(_law_rows(found))}
    for name, text in texts.items():
        write_whole(out / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return found, [*(out / name for name in texts), *pictures]


def write_report(source: Path, out: Path) -> list[Path]:
    """The report on a sweep's directory, or on a CSV; returns the files that were written.

    Raises:
        ConfigError, OSError: as `read_points` and `report`.
    """
    return report(read_points(source), out, title=f"Scaling report: {source.name}")[1]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _point_rows(found: Analysis) -> list[dict[str, Any]]:
    """Every row of the sweep: what it is, what the law says of it, and the rule by which it was left out."""
    expected = {}
    if found.main is not None:
        names = [point.id for point in found.main.points]
        expected = dict(zip(names, found.main.law(found.main.x).tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    for point in found.points:
        row = {name: getattr(point, name) for name in POINT_COLUMNS} | {"epochs": epochs_of(point)}
        by_law = expected.get(point.id)
        rows.append({**row, **{f"set {key}": value for key, value in point.varied.items()}, "loss by the law": by_law,
                     "residual": None if by_law is None else (point.loss - by_law) / by_law, "left out": ""})
    return rows + [{"id": left.id, "left out": left.reason} for left in found.left]


def _law_rows(found: Analysis) -> list[dict[str, Any]]:
    """Every fitted number with its interval: a row each."""
    return [row for fitted in found.fits for row in _numbers_of(fitted)]


def _numbers_of(fitted: Fitted) -> Iterable[dict[str, Any]]:
    trust = fitted.trust
    numbers: list[tuple[str, float, float, Interval]] = [("E", fitted.law.floor, fitted.second.floor, trust.floor)]
    for j, axis in enumerate(fitted.law.axes):
        numbers.append((f"amplitude of {axis}", fitted.law.amplitudes[j], fitted.second.amplitudes[j],
                        trust.amplitudes[j]))
        numbers.append((f"exponent of {axis}", fitted.law.exponents[j], fitted.second.exponents[j], trust.exponents[j]))
    for name, value, second, interval in numbers:
        yield {"runs": fitted.name, "count": fitted.law.runs, "number": name, "least squares": value,
               "low": interval.low if interval.identified else "", "high": interval.high if interval.identified else "",
               "not identified": interval.reason, "huber": second}
