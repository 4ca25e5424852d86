"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar. Only rank 0 makes a `Metrics`."""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from hyena_dist.train.files import write_whole, writing

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
    """The whole rows of a metrics.jsonl; a last line cut short by a killed run is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            logger.warning("%s: left out a line that is not a row of metrics: %.60r", path, line)
    return rows


class Metrics:
    """Writes the rows of a run that continues after `last_step`; rows past it, of a killed run, are dropped.

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
        kept = [row for row in read_rows(self._path) if row.step <= last_step]
        text = "".join(json.dumps(asdict(row)) + "\n" for row in kept)
        write_whole(self._path, lambda path: path.write_text(text))
        self._file = self._path.open("ab", buffering=0)
        self._size = len(text.encode())
        self._board: SummaryWriter | None = None
        with self._surviving("TensorBoard's curves end here"):
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
            logger.error("%s: could not be written (%s): make room there; %s", self._path.parent,
                         error.strerror or error, consequence)

    def _close_files(self) -> None:
        self._file.close()
        if self._board is not None:
            with self._surviving("TensorBoard's curves lack their end"):
                self._board.close()
            self._board = None


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
