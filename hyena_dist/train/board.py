"""TensorBoard's curves and hyperparameters: `tensorboard/` of a run directory.

Training and validation are two of TensorBoard's runs, `train` and `val`, which use the same tags: it draws the curves
of one tag into one chart. The hyperparameters are in the directory above the two.
"""

import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.record_writer import RecordWriter

Value = str | bool | int | float


class EventFile:
    """One start's events of one directory, written at once and without a thread, so that an error is raised here.

    TensorBoard reads the files of a directory in the order of their names, which begin with a time, and does not go
    back to a name before the one that it has read. So the name begins with the time now, or with one second more than
    the newest file has: the clock may have been set back.

    Args:
        last_step: TensorBoard forgets what earlier files say of later steps, which come again.

    Raises:
        OSError: it cannot be written; so do all methods.
    """

    def __init__(self, directory: Path, *, last_step: int, wall_time: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[1]) for path in directory.iterdir() if (match := _NAME.match(path.name))]
        number = max([int(time.time()), *(taken + 1 for taken in numbers)])
        path = directory / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=wall_time, file_version="brain.Event:2"))
        self._write(Event(wall_time=wall_time, step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, *, step: int, wall_time: float) -> None:
        """Append values of a step."""
        self._write(Event(wall_time=wall_time, step=step, summary=summary))

    def close(self) -> None:
        """Nothing is buffered: only the descriptor is given back."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


class Board:
    """The directory of a run that goes on after `last_step`.

    Args:
        settings: the run's hyperparameters.
        charts: tags by which its table of runs shows validation.

    Raises:
        OSError: it cannot be written; so does `add`.
    """

    def __init__(self, directory: Path, *, last_step: int, wall_time: float, settings: Mapping[str, Value],
                 charts: tuple[str, ...]) -> None:
        self._files = {split: EventFile(directory / split, last_step=last_step, wall_time=wall_time)
                       for split in ("train", "val")}
        if settings:
            table = EventFile(directory, last_step=last_step, wall_time=wall_time)
            for summary in (hparams.hparams_config_pb([hparams.HParam(key) for key in settings],
                                                      [hparams.Metric(tag, group="val") for tag in charts]),
                            hparams.hparams_pb(dict(settings), start_time_secs=wall_time)):
                table.add(Summary.FromString(summary.SerializeToString()), step=0, wall_time=wall_time)
            table.close()

    def add(self, split: str, values: Mapping[str, float], *, step: int, wall_time: float) -> None:
        """Append a point to the curve of each value; what is no finite float32 has no place in a chart."""
        drawn = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
                 if math.isfinite(value) and abs(value) < _MOST]
        self._files[split].add(Summary(value=drawn), step=step, wall_time=wall_time)

    def close(self) -> None:
        """Give the files back."""
        for file in self._files.values():
            file.close()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """A tree of settings as one level of `section.key`; what is neither text nor number is written as text, null as
    `null`."""
    found: dict[str, Value] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | bool | int | float):
            found[prefix + key] = value
        else:
            found[prefix + key] = "null" if value is None else str(value)
    return found


_MOST = 3e38
"""No float32 is as large."""
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10,})\.")
