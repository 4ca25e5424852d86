"""The table of a suite beside published numbers: as Markdown, CSV and a picture."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.suites.description import Suite, Task
from hyena_dist.tasks.suites.settings import Point

logger = logging.getLogger(__name__)

MARKDOWN, CSV, PICTURE = "table.md", "table.csv", "table.png"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    task: str
    metric: str
    state: str
    """done; or why there is no number: left out, missing, refused, failed, not run yet."""
    said: str = ""
    """More on that, for a person."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """mean, deviation, lowest, highest and seeds of the metric on test."""
    beside: Mapping[str, float | None] = field(default_factory=dict)
    """The mean of each baseline's metric."""
    published: Mapping[str, float] = field(default_factory=dict)
    """By model."""
    setting: str = ""
    """What was chosen from the grid."""
    collapsed: Sequence[int] = ()
    """Seeds whose model says one class of everything."""
    notes: Sequence[str] = ()


def _published(suite: Suite, task: Task) -> dict[str, float]:
    return {row.model: row.values[task.name] for row in suite.published if task.name in row.values}


def left_out(suite: Suite, task: Task, state: str, said: str) -> Row:
    """A row without a number of ours."""
    return Row(task.name, task.metric, state, said, published=_published(suite, task))


def row_of(suite: Suite, task: Task, results: Sequence[tuple[Point, Mapping[str, Any]]],
           notes: Sequence[str] = ()) -> Row:
    """The row of a task: the setting that does best on the validation splits, by the task's metric, judged on test. The
    test scores of the others are not looked at."""
    point, result = max(results, key=lambda item: _on_valid(item[1], task.metric))
    if result["judged_on"] != "test" or task.metric not in result["metrics"]:
        return left_out(suite, task, "failed", f"its result has no {task.metric} on test")
    beside = {name: spreads[task.metric]["mean"] for name, spreads in result["baselines"].items()
              if task.metric in spreads}
    setting = ", ".join(f"{key}={value}" for key, value in point.keys.items())
    return Row(task.name, task.metric, "done", ours=result["metrics"][task.metric], beside=beside,
               published=_published(suite, task), setting=setting, collapsed=result["collapsed_seeds"],
               notes=[*notes, *result["notes"]])


def _on_valid(result: Mapping[str, Any], metric: str) -> float:
    """The mean over the seeds; a metric without a value is worse than any."""
    values = [seed["scores"]["valid"].get(metric) for seed in result["seeds"]]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if len(found) == len(values) else -float("inf")


def write_table(out: Path, suite: Suite, model: str, changes: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write the table into a directory, in all three forms.

    Raises:
        OSError: it cannot be written.
    """
    text = markdown(suite, model, changes, rows)
    _write(out / MARKDOWN, text)
    _write(out / CSV, _csv(suite, model, changes, rows))
    if any(row.state == "done" for row in rows):
        try:
            _draw(out / PICTURE, suite, rows)
        except ImportError:
            logger.warning("no %s: matplotlib is missing; install it with pip install 'hyena-dist[plots]'", PICTURE)


def _write(path: Path, text: str) -> None:
    """In UTF-8, also where a message names a file whose name is no text."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Baselines and published models that any row has, in the order in which they come."""
    return ([*dict.fromkeys(name for row in rows for name in row.beside)],
            [*dict.fromkeys(name for row in rows for name in row.published)])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(suite: Suite, model: str, changes: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The table as a page."""
    beside, published = _columns(rows)
    unchecked = {row.model for row in suite.published if not row.checked}
    names = [*(f"here: {name}" for name in beside),
             *(f"published: {name}{'*' * (name in unchecked)}" for name in published)]
    lines = [f"# {suite.name}", "", f"Model: `{model}`. Protocol **{suite.name}**: {suite.protocol}.", "",
             f"Otherwise than its authors: {suite.differs}.", ""]
    if changes:
        lines += ["**Changed by the command, so not this protocol:** " + ", ".join(
            f"`{key}={value}`" for key, value in changes.items()) + ".", ""]
    header = ["task", "metric", "this model", "lowest to highest", "seeds", *names]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        ours = [row.state, "", ""]
        if row.state == "done":
            deviation = row.ours["deviation"]
            ours = [_number(row.ours["mean"]) + (f" ± {deviation:.3f}" if deviation is not None else ""),
                    f"{_number(row.ours['lowest'])} to {_number(row.ours['highest'])}", str(row.ours["seeds"])]
        cells = [row.task, row.metric, *ours, *(_number(row.beside.get(name)) for name in beside),
                 *(_number(row.published.get(name)) for name in published)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "± is the standard deviation over the seeds (n - 1). What is `here` is of the same splits and seeds.",
              ""]
    for theirs in suite.published:
        if theirs.model in published:
            unsure = "" if theirs.checked else "; * not compared with the source"
            lines.append(f"- {theirs.model}: {theirs.source}{unsure}.")
    if any(row.state == "missing" for row in rows):
        lines.append(f"- Files that are missing: {suite.where}.")
    return "\n".join([*lines, *_remarks(rows)]) + "\n"


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What is to be said of single tasks, a list."""
    found = []
    for row in rows:
        if row.said:
            found.append(f"- {row.task}: {row.state}: {row.said}")
        if row.setting:
            found.append(f"- {row.task}: chosen on the validation splits: {row.setting}")
        if row.collapsed:
            found.append(f"- {row.task}: the model of seeds {', '.join(map(str, row.collapsed))} **collapsed**: it "
                         "says one class of everything")
        found += [f"- {row.task}: {note}" for note in row.notes]
    return found


def _csv(suite: Suite, model: str, changes: Mapping[str, str], rows: Sequence[Row]) -> str:
    beside, published = _columns(rows)
    said = io.StringIO()
    writer = csv.writer(said, lineterminator="\n")
    writer.writerow(["protocol", "changed", "model", "task", "metric", "state", "mean", "deviation", "lowest",
                     "highest", "seeds", "collapsed_seeds", "setting", *beside,
                     *(f"published: {name}" for name in published)])
    changed = " ".join(f"{key}={value}" for key, value in changes.items())
    for row in rows:
        numbers = [row.ours.get(name) for name in ("mean", "deviation", "lowest", "highest", "seeds")]
        writer.writerow([suite.name, changed, model, row.task, row.metric, row.state,
                         *("" if value is None else value for value in numbers), " ".join(map(str, row.collapsed)),
                         row.setting, *(row.beside.get(name, "") for name in beside),
                         *(row.published.get(name, "") for name in published)])
    return said.getvalue()


def _draw(path: Path, suite: Suite, rows: Sequence[Row]) -> None:
    """A line for each task that has a number: ours with its range, the baselines and the published ones."""
    from hyena_dist.tasks.scaling.pictures import figure

    done = [row for row in rows if row.state == "done" and row.ours["mean"] is not None]
    beside, published = _columns(done)
    with figure(path, width=8.0, height=1.4 + 0.32 * len(done) + 0.18 * (len(beside) + len(published))) as (_, [axes]):
        places = range(len(done))
        means = [row.ours["mean"] for row in done]
        axes.hlines(places, [row.ours["lowest"] for row in done], [row.ours["highest"] for row in done], color="C0")
        axes.plot(means, places, "o", color="C0", label="this model, with the range of its seeds", zorder=3)
        for number, name in enumerate((*beside, *published), 1):
            at = [(value, place) for row, place in zip(done, places, strict=True)
                  if (value := {**row.published, **row.beside}.get(name)) is not None]
            axes.plot([value for value, _ in at], [place for _, place in at], "v" if name in beside else "d",
                      color=f"C{number}", alpha=0.8,
                      label=f"here: {name}" if name in beside else f"published: {name}")
        axes.set_yticks(places, [f"{row.task} ({row.metric})" for row in done])
        axes.invert_yaxis()
        axes.set_title(f"{suite.name}: test splits")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)
