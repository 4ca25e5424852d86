"""What a run says of itself: every metric that there is, the rows of metrics.jsonl, and who else is told of them. Only
rank 0 makes a `Metrics`."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from hyena_dist.config.plain import finite
from hyena_dist.runtime.files import surviving
from hyena_dist.train.board import Board, flat
from hyena_dist.train.progress import Countable, RunProgress
from hyena_dist.train.row_file import RowFile, json_object, read_lines
from hyena_dist.train.weights_and_biases import WandbRun

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """A number that rows have, and how it is drawn. TensorBoard and W&B draw every one under its name."""

    name: str
    """A field of `Row`, or the name of one of its extras."""
    label: str
    """What it is, with its unit: the axis in the report."""
    log: bool = False
    """Draw it on a logarithmic axis."""
    smooth: bool = False
    """Draw a running median over its values, which jump from step to step."""
    unit: float = 1.0
    """Values are divided by this where they are drawn in the report."""
    beside: str = ""
    """The metric in whose panel of the report it is drawn; empty: its own."""


METRICS = (
    Metric("loss", "loss [nats per base]", smooth=True),
    Metric("perplexity", "perplexity per base", smooth=True),
    Metric("grad_norm", "gradient norm before clipping", log=True, smooth=True),
    Metric("lr", "learning rate"),
    Metric("tokens_per_second", "tokens/s of a step, all ranks [thousands]", smooth=True, unit=1e3),
    Metric("steady_tokens_per_second", "steady", unit=1e3, beside="tokens_per_second"),
    Metric("mfu", "model FLOPs utilisation", smooth=True),
    Metric("bandwidth", "share of the memory bandwidth", smooth=True),
    Metric("peak_memory_bytes", "peak memory of rank 0 [GiB]", unit=2.0**30),
    Metric("seq_len", "sequence length [tokens]"),
    Metric("scored", "scored", smooth=True),
    Metric("epoch", "epochs of the training data"),
    Metric("source_perplexity", "perplexity per base, by source"),
    Metric("species_perplexity", "perplexity per base, by species"),
    Metric("case_perplexity", "perplexity per base, by case"),
    Metric("source_share", "share of the training tokens, by source"),
    Metric("source_epochs", "epochs of each source"),
    Metric("source_unique_bases", "bases seen of each source [millions]", unit=1e6),
    Metric("source_loss_mass", "share of the loss, by source"),
)
"""Every metric of a run. A new one is a line here, and its value in the `extras` of a row. One of several things, such
as the sources of a mixture, stands there once for each, under names like `source_share/human`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of metrics.jsonl, where the extras stand beside the fields. What is no finite number is null there."""

    step: int
    """Optimizer steps done."""
    split: str
    """train or val."""
    loss: float
    """Nats per scored base, whatever a token is: of k-mers side by side those of a token divided by k. Of a fine-tuning
    that of its labels."""
    perplexity: float | None = None
    """Per base, exp of the loss; inf where that is beyond floats, null in the file. None, and not in the file: the loss
    is not that of bases."""
    tokens: int
    """Training tokens seen so far, over all ranks."""
    scored: float | None = None
    """Bases, or sequences of a fine-tuning, that `loss` is the mean of (`Objective.scored_name`), over all ranks: of
    this step, or of the validation; where they have weights, the sum of those."""
    seq_len: int
    lr: float | None
    grad_norm: float | None
    """Before clipping; null in validation rows."""
    tokens_per_second: float | None
    """Over all ranks, of this step; null in validation rows."""
    peak_memory_bytes: int
    """Of this rank: the device's allocations on CUDA, the process's resident set on a CPU."""
    time: float | None = None
    """Unix seconds, by this machine's clock; null in rows of earlier versions."""
    epoch: float | None = None
    """How often the training bases have been seen so far."""
    extras: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by their names: what only some devices, runs or tasks have."""

    def values(self) -> dict[str, float]:
        """Every number of it that is a metric, by name, extras last; those that are null are left out."""
        own = {metric.name: getattr(self, metric.name) for metric in METRICS if metric.name in _FIELDS}
        return {name: value for name, value in {**own, **self.extras}.items() if value is not None}


_FIELDS = {row_field.name: row_field for row_field in fields(Row) if row_field.name != "extras"}


def extra_names(declared: Collection[str] = ()) -> frozenset[str]:
    """What may stand in the extras of a row of a run whose objective declares these metrics."""
    return frozenset({*declared, *(metric.name for metric in METRICS)} - _FIELDS.keys())


def metric_of(name: str) -> Metric:
    """The metric of a name; one that this version does not know is drawn plainly."""
    kind = name.partition("/")[0]
    return next((metric for metric in METRICS if metric.name == kind), Metric(name, name.replace("_", " ")))


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, those of a newer version too; other lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    rows = [_row(line) for line in read_lines(path)]
    if strange := [number for number, row in enumerate(rows, start=1) if row is None]:
        logger.warning("%s: left out %d lines that are no rows of metrics; the first is line %d", path, len(strange),
                       strange[0])
    return [row for row in rows if row is not None]


def _row(line: bytes) -> Row | None:
    value = json_object(line)
    if value is None or value.get("split") not in ("train", "val"):
        return None
    if value.get("perplexity", 0) is None:  # beyond floats
        value["perplexity"] = math.inf
    known = {name: value.pop(name, row_field.default) for name, row_field in _FIELDS.items()}
    extras = {name: number for name, number in value.items() if type(number) in (int, float)}
    fit = all(_fits(known[name], row_field.type) for name, row_field in _FIELDS.items())
    return Row(**known, extras=extras) if fit else None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of the type of a row's field; a whole number is a float too, but True is no number."""
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (type(value) is int and float in kinds)


class SteadyClock:
    """Times of a clock that is set back now and then, as times that never fall: where it was, they stand still for a
    moment and go on from there."""

    def __init__(self) -> None:
        self._last, self._ahead = -math.inf, 0.0

    def of(self, time: float) -> float:
        """The steady time of the next time of the clock."""
        self._ahead = max(self._ahead, self._last - time)
        self._last = time + self._ahead
        return self._last


class Metrics:
    """Tells everybody of the rows of a run that continues after `last_step`: metrics.jsonl (`RowFile`), TensorBoard,
    the progress bar, and W&B where it is wanted. TensorBoard's curves end where they cannot be written.

    Args:
        now: the time at which the run goes on, as rows have it.
        settings: the run's configuration, for the tables of runs.
        extras: metrics of the run's objective (`Objective.extras`) that may stand in a row's extras beside `METRICS`.
        wandb: the project at W&B; empty: none.
        anew: the run begins at `last_step`, as a branch of another one does: rows of the steps before are not its own.

    Raises:
        ConfigError: W&B is wanted and does not start.
        OSError: metrics.jsonl cannot be read or written.
    """

    def __init__(self, run_dir: Path, *, last_step: int, total_steps: int, now: float,
                 settings: Mapping[str, Any] | None = None, wandb: str = "",
                 extras: Collection[str] = (), anew: bool = False) -> None:
        self._board_path = run_dir / "tensorboard"
        self._settings = flat(settings or {})
        self._extras = extra_names(extras)
        self._wandb = WandbRun(wandb, run_dir, self._settings) if wandb else None
        self._rows = RowFile(run_dir / "metrics.jsonl", last_step=-1 if anew else last_step)
        self._board: Board | None = None
        self._open_board(-1 if anew else last_step, now)
        self._progress = RunProgress(last_step, total_steps)

    def _open_board(self, last_step: int, now: float) -> None:
        self._clock = SteadyClock()
        for line in self._rows.kept:
            time = (json_object(line) or {}).get("time")
            if isinstance(time, int | float):
                self._clock.of(time)
        with surviving(self._board_path, "TensorBoard's curves end here"):
            self._board = Board(self._board_path, last_step=last_step, wall_time=self._clock.of(now),
                                settings=self._settings, charts=("loss", "perplexity"))

    def go_back(self, last_step: int, *, now: float) -> None:
        """Drop the rows past `last_step`: the run goes on from there."""
        self._rows.go_back(last_step)
        self._close_board()
        self._open_board(last_step, now)

    def write(self, row: Row) -> None:
        """Tell everybody of the next row, which has a time."""
        values = row.values()
        assert row.time is not None
        assert row.extras.keys() <= self._extras, f"undeclared metrics: {sorted(row.extras.keys() - self._extras)}"
        own = {name: getattr(row, name) for name in _FIELDS if name != "perplexity" or row.perplexity is not None}
        self._rows.write(row.step, finite({**own, **row.extras}))
        board, self._board = self._board, None
        if board is not None:
            with surviving(self._board_path, "TensorBoard's curves end here"):
                board.add(row.split, values, step=row.step, wall_time=self._clock.of(row.time))
                self._board = board
        if self._wandb is not None:
            self._wandb.add(row.split, values, step=row.step)
        if row.split == "train":
            rate = row.extras.get("steady_tokens_per_second", row.tokens_per_second)
            self._progress.train(row.step, loss=row.loss, tokens_per_second=rate or 0.0)
        else:
            what, value = ("loss", row.loss) if row.perplexity is None else ("perplexity", row.perplexity)
            self._progress.val(row.step, what, value)

    def validating(self, batches: Countable[T]) -> Iterator[T]:
        """The batches of a validation, which shows its progress while they are taken."""
        return self._progress.validating(batches)

    def close(self) -> None:
        """All but W&B. Raises OSError when rows could not be written to the end."""
        self._progress.close()
        self._close_board()
        self._rows.close()

    def close_wandb(self) -> None:
        """Wait for W&B, when nobody waits for this rank any more."""
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def elapsed(rows: Iterable[Row]) -> list[float]:
    """Seconds from the first row to each, as a clock tells them that is never set back; 0 of rows without a time."""
    clock, times = SteadyClock(), list[float | None]()
    for row in rows:
        times.append(clock.of(row.time) if row.time is not None else times[-1] if times else None)
    first = next((time for time in times if time is not None), 0.0)
    return [0.0 if time is None else time - first for time in times]
