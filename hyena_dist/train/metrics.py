"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar. Only rank 0 makes a `Metrics`."""

import json
import logging
import resource
import sys
import time
from contextlib import suppress
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
    seq_len: int
    lr: float | None
    grad_norm: float | None
    """Before clipping; null in validation rows."""
    tokens_per_second: float | None
    """Over all ranks, of this step; null in validation rows."""
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
    """Writes the rows of a run that continues after `last_step`; rows past it, of a killed run, are dropped."""

    def __init__(self, run_dir: Path, *, last_step: int, total_steps: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        kept = [row for row in read_rows(self._path) if row.step <= last_step]
        text = "".join(json.dumps(asdict(row)) + "\n" for row in kept)
        write_whole(self._path, lambda path: path.write_text(text))
        self._file = self._path.open("a")
        self._board_path = run_dir / "tensorboard"
        with writing(self._board_path):
            self._board = SummaryWriter(str(self._board_path), purge_step=last_step + 1)
        self._progress = _ProgressLine(last_step, total_steps)

    def write(self, row: Row) -> None:
        with writing(self._path):
            self._file.write(json.dumps(asdict(row)) + "\n")
            self._file.flush()
        values = asdict(row)
        with writing(self._board_path):
            for key in ("loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"):
                if values[key] is not None:
                    self._board.add_scalar(f"{row.split}/{key}", values[key], row.step)
        self._progress.update(row)

    def close(self) -> None:
        self._progress.close()
        with suppress(OSError):  # every row was flushed: what fails here has failed, and was raised, there
            self._file.close()
        with writing(self._board_path):
            self._board.close()


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
