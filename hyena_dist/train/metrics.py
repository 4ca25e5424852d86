"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar. Only rank 0 makes a `Metrics`."""

import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from hyena_dist.config.errors import write_remedy
from hyena_dist.config.plain import open_regular
from hyena_dist.runtime.files import write_whole, writing

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 15
"""Without a terminal the progress bar is a line in the log, this often."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps done."""
    split: str
    """train or val."""
    loss: float
    """Nats per scored token."""
    perplexity: float
    tokens: int
    """Training tokens seen so far, over all ranks."""
    scored: int | None = None
    """Bases that `loss` is the mean of, over all ranks: of this step, or of the validation."""
    seq_len: int
    lr: float | None
    grad_norm: float | None
    """Before clipping; null in validation rows."""
    tokens_per_second: float | None
    """Over all ranks, of this step; null in validation rows."""
    mfu: float | None = None
    """Model FLOPs utilisation of all devices; null where their peak is not known, and in validation rows."""
    bandwidth: float | None = None
    """Share of the devices' memory bandwidth, by the bytes that the model must move at least; null as mfu."""
    peak_memory_bytes: int
    """Of this rank: the device's allocations on CUDA, the process's resident set on a CPU."""


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, of those of a newer version what this one knows; other lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    rows = [_row(line) for line in _lines(path)]
    if strange := [number for number, row in enumerate(rows, start=1) if row is None]:
        logger.warning("%s: left out %d lines that are no rows of metrics; the first is line %d", path, len(strange),
                       strange[0])
    return [row for row in rows if row is not None]


def _lines(path: Path) -> list[bytes]:
    """Of a metrics.jsonl, without their ends; a last one cut short by a killed run is left out."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}): make it a readable file, move it away, or change "
                      "train.run_dir") from error
    *lines, last = content.split(b"\n")
    if last and _object(last) is None:
        logger.warning("%s: left out a last line that was cut short", path)
    elif last:
        lines.append(last)
    return lines


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _row(line: bytes) -> Row | None:
    value = _object(line)
    if value is None or value.get("split") not in ("train", "val"):
        return None
    known = {field.name: value.get(field.name, field.default) for field in fields(Row)}
    return Row(**known) if all(_fits(known[field.name], field.type) for field in fields(Row)) else None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of the type of a row's field; a whole number is a float too, but True is no number."""
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (type(value) is int and float in kinds)


class Metrics:
    """Writes the rows of a run that continues after `last_step`; rows past it, of a killed run, are dropped, and lines
    that are no rows are kept as they are.

    A full disk does not end the run: it is logged, rows wait in memory, and the next one tries again.
    """

    def __init__(self, run_dir: Path, *, last_step: int, total_steps: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._board_path = run_dir / "tensorboard"
        self._waiting: list[tuple[int, bytes]] = []
        """Step and text of rows that are not on the disk yet."""
        self._open(last_step)
        self._progress = _ProgressLine(last_step, total_steps)

    def _open(self, last_step: int) -> None:
        text = b"".join(line + b"\n" for line in _lines(self._path) if not _is_past(line, last_step))
        write_whole(self._path, lambda path: path.write_bytes(text))
        self._file = self._path.open("ab", buffering=0)
        self._size = len(text)
        self._board: SummaryWriter | None = None
        with self._surviving("TensorBoard's curves end here"):
            _put_behind(self._board_path, int(time.time()))
            self._board = SummaryWriter(str(self._board_path), purge_step=last_step + 1)

    def go_back(self, last_step: int) -> None:
        """Drop the rows past `last_step`: the run goes on from there."""
        self._close_files()
        self._waiting = [(step, text) for step, text in self._waiting if step <= last_step]
        self._open(last_step)

    def write(self, row: Row) -> None:
        values = asdict(row)
        self._waiting.append((row.step, json.dumps(values).encode() + b"\n"))
        with self._surviving("its rows wait in memory"):
            self._write_waiting()
        board, self._board = self._board, None
        if board is not None:
            with self._surviving("TensorBoard's curves end here"):
                for key in ("loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "mfu", "bandwidth",
                            "peak_memory_bytes"):
                    if values[key] is not None:
                        board.add_scalar(f"{row.split}/{key}", values[key], row.step)
                self._board = board
        self._progress.update(row)

    def close(self) -> None:
        """Raises OSError when rows could not be written to the end."""
        self._progress.close()
        self._close_files()
        if self._waiting:
            with writing(self._path), self._path.open("ab", buffering=0) as self._file:
                self._write_waiting()

    def _write_waiting(self) -> None:
        rows = b"".join(text for _, text in self._waiting)
        written = 0
        try:
            while written < len(rows):
                written += self._file.write(rows[written:])
        except OSError:
            os.truncate(self._path, self._size)  # no half of a row
            raise
        self._size += len(rows)
        self._waiting.clear()

    @contextmanager
    def _surviving(self, consequence: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("%s: could not be written (%s): %s; %s", self._path.parent, error.strerror or error,
                         write_remedy(error, "start again in another train.run_dir"), consequence)

    def _close_files(self) -> None:
        self._file.close()
        if self._board is not None:
            with self._surviving("TensorBoard's curves lack their end"):
                self._board.close()
            self._board = None


def _is_past(line: bytes, last_step: int) -> bool:
    step = (_object(line) or {}).get("step")
    return type(step) is int and step > last_step


def _put_behind(board_path: Path, now: int) -> None:
    """Rename the event files of earlier starts so that a file of this second is read after them.

    TensorBoard reads files in the order of their names, which begin with the time, and a new one takes back the steps
    that are to come again. After a clock that was ahead, the earlier start would be read last, and show them twice.
    """
    found = sorted((path.name, match) for path in board_path.glob("events.out.tfevents.*")
                   if (match := _EVENTS.fullmatch(path.name)))
    renames, before = [], now
    for name, match in reversed(found):
        before = min(before - 1, int(match[1]))
        renames.append((name, f"events.out.tfevents.{before:010d}{match[2]}"))
    for old, new in reversed(renames):  # the oldest first: its new name is nobody's
        if old != new:
            (board_path / old).rename(board_path / new)


_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{10,})(\..*)", re.DOTALL)


class _ProgressLine:
    """A bar with loss, tokens/s and time left on a terminal, now and then a line in the log without one."""

    def __init__(self, done: int, total: int) -> None:
        self._total, self._start, self._first, self._last_log = total, time.monotonic(), done, 0.0
        self._val = ""
        self._bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                             TimeRemainingColumn(), console=Console(file=sys.stderr),
                             disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def update(self, row: Row) -> None:
        if row.split == "val":
            self._val = f"  val perplexity {row.perplexity:.4f}"
            if self._bar.disable:
                logger.info("step %d/%d  val perplexity %.4f", row.step, self._total, row.perplexity)
            return
        text = f"loss {row.loss:.4f}  {row.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=row.step, description=text + self._val)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_log > LOG_INTERVAL_SECONDS or row.step == self._total):
            left = (now - self._start) / max(1, row.step - self._first) * (self._total - row.step)
            logger.info("step %d/%d  %s  %.0f s left", row.step, self._total, text, left)
            self._last_log = now

    def close(self) -> None:
        self._bar.stop()
