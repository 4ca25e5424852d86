"""metrics.jsonl as a file of lines that survives kills and full disks; what is in a line is for `metrics` to say."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from hyena_dist.config.plain import open_regular
from hyena_dist.runtime.files import surviving, write_whole, writing

logger = logging.getLogger(__name__)


def content_of(path: Path) -> bytes:
    """All of a file of a run; nothing of a file that is not there.

    Raises:
        OSError: it cannot be read; names the remedy.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}): make it a readable file, move it away, or change "
                      "train.run_dir") from error


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file without their ends; none of a file that is not there. A last line that a kill cut short is
    left out.

    Raises:
        OSError: it cannot be read.
    """
    *lines, last = content_of(path).split(b"\n")
    if last and json_object(last) is None:
        logger.warning("%s: left out a last line that was cut short", path)
    elif last:
        lines.append(last)
    return lines


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None: it holds something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class RowFile:
    """Appends rows to a file, from which the rows past `last_step` are dropped first: they are of a killed run, whose
    steps come again. Lines that are no rows are kept as they are.

    A full disk does not end the run: it is logged, rows wait in memory, and the next write tries again.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        self._waiting: list[tuple[int, bytes]] = []
        """Step and text of the rows that are not on the disk yet."""
        self._reopen(last_step)

    def _reopen(self, last_step: int) -> None:
        """Open the file, without the rows past `last_step`."""
        self.kept = [line for line in read_lines(self._path) if not _is_past(line, last_step)]
        """The lines that were in the file when it was opened."""
        text = b"".join(line + b"\n" for line in self.kept)
        write_whole(self._path, lambda path: path.write_bytes(text))
        self._file = self._path.open("ab", buffering=0)
        self._size = len(text)

    def go_back(self, last_step: int) -> None:
        """Drop the rows past `last_step`, those that wait too."""
        self._file.close()
        self._waiting = [(step, text) for step, text in self._waiting if step <= last_step]
        self._reopen(last_step)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append a row."""
        self._waiting.append((step, json.dumps(row, allow_nan=False).encode() + b"\n"))
        with surviving(self._path.parent, "its rows wait in memory"):
            self._write_waiting()

    def close(self) -> None:
        """Raises OSError when rows could not be written to the end."""
        self._file.close()
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


def _is_past(line: bytes, last_step: int) -> bool:
    row = json_object(line) or {}
    return type(row.get("step")) is int and row["step"] > last_step and "split" in row  # without: somebody's own line
