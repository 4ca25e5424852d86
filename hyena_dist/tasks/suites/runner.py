"""Runs the tasks of a suite, one after the other, each setting in a process of its own. All that it knows is on the
disk: it may be killed at any moment, and the same command goes on."""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hyena_dist
from hyena_dist.config.errors import ConfigError, UserError, one_line
from hyena_dist.data.errors import DataError
from hyena_dist.runtime.files import write_whole
from hyena_dist.runtime.requeue import in_use
from hyena_dist.runtime.signals import EXIT_REQUEUE
from hyena_dist.tasks.made_of import read_found
from hyena_dist.tasks.suites.description import MissingFiles, Suite, Task
from hyena_dist.tasks.suites.prepare import TABLE, prepare
from hyena_dist.tasks.suites.settings import Point, arguments_of, points_of
from hyena_dist.tasks.suites.table import Row, left_out, row_of, write_table
from hyena_dist.tasks.sweep.results import last_error

logger = logging.getLogger(__name__)

SUITE, LOG, RESULT = "suite.json", "log.txt", "result.json"
FINETUNE = (str(Path(hyena_dist.__file__).parent / "cli" / "main.py"), "finetune")
_POLL = 0.2
"""Seconds between two looks at a run."""
_ORPHAN = 60.0
"""Seconds in which a run that has outlived its command saves and ends."""


class Stopped(Exception):  # noqa: N818 - no error
    """The command was asked to stop, and the run under way has saved."""


@dataclass
class Runner:
    """Runs a suite.

    Args:
        model: a run, a checkpoint or a directory of weights.
        data: where the files of the suite are.
        out: everything is written in here.
        config: the configuration that the protocol's keys are put on: a file or the name of a preset.
        changes: keys that the command sets.
        launch: words that start the ranks of a run; (): one process.
        stop: the reason to stop, once there is one.
    """

    suite: Suite
    model: str
    data: Path
    out: Path
    config: str = "finetune/suite"
    changes: Mapping[str, str] = field(default_factory=dict)
    launch: Sequence[str] = ()
    most: int | None = None
    """Training sequences of a task that are used; None: all."""
    start: str = ""
    """Where the weights of `model` were found when the command began: every run takes them from there, though the run
    that they are of may save others meanwhile."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """What `model` and `config` hold, since both may change and keep their names: `weights`, a digest, and
    `configuration`, its values by key."""
    stop: Callable[[], str | None] = lambda: None

    def check_same(self) -> dict[str, Any]:
        """What is to be noted of this directory. An earlier start must have been of the same, but for the tasks.

        Raises:
            ConfigError: it was of something else.
        """
        windows = sorted({task.window for task in self.suite.tasks if task.window})
        asked = {"suite": self.suite.name, "from": self.model, "data": str(self.data.resolve()), "config": self.config,
                 "changes": dict(self.changes), "most": self.most,
                 "length": windows[0] if windows else None}
        path, before = self.out / SUITE, {}
        if path.exists():
            before = read_found(path, f"give another --out, or remove {self.out} to run everything anew")
            for key, value in asked.items():
                if before.get(key) != value:
                    raise ConfigError(f"--out {self.out}: has results of {key} {before.get(key)!r}, and the command "
                                      f"says {value!r}: give another --out, or say the same to go on")
            self._check_content(before)
        # What an earlier version has not noted is added.
        configuration = {**self.content.get("configuration", {}), **before.get("configuration", {})}
        return {**asked, **self.content, "configuration": configuration}

    def _check_content(self, before: Mapping[str, Any]) -> None:
        """Raises ConfigError: the model or the configuration is another one than that of an earlier start."""
        now = self.content.get("configuration", {})
        then = before.get("configuration", {})
        if before.get("weights", self.content.get("weights")) != self.content.get("weights"):
            raise ConfigError(f"--out {self.out}: has results of other weights than those that --from {self.model} "
                              "holds now: give another --out, or the weights as they were to go on")
        for key in sorted(now.keys() & then.keys()):  # an earlier version may have had other keys
            if now[key] != then[key]:
                raise ConfigError(f"--out {self.out}: has results of {key} {then[key]!r}, and --config {self.config} "
                                  f"or the protocol now says {now[key]!r}: give another --out, or set it as it was to "
                                  "go on")

    def run(self, tasks: Sequence[Task], *, asked: bool) -> list[Row]:
        """Run what is not finished; the table is written after each task.

        Args:
            asked: whether the tasks were named by the user; then missing files are an error, and else a task is left
                out for them.

        Raises:
            Stopped: the run under way was told to stop, and has saved.
            UserError: files that were asked for are missing.
        """
        content = json.dumps(self.check_same(), indent=1) + "\n"
        write_whole(self.out / SUITE, lambda aside: aside.write_text(content, encoding="utf-8"))
        rows: list[Row] = []
        for task in tasks:
            try:
                rows.append(self._task(task))
            except MissingFiles as error:
                if asked:
                    raise
                rows.append(left_out(self.suite, task, "missing", one_line(error.what)))
            except DataError as error:
                rows.append(left_out(self.suite, task, "refused", one_line(error)))
            row = rows[-1]
            logger.info("%s: %s", task.name, row.state if not row.said else f"{row.state}: {row.said}")
            self._write(tasks, rows)
        return rows

    def _write(self, tasks: Sequence[Task], rows: list[Row]) -> None:
        waiting = [left_out(self.suite, task, "not run yet", "") for task in tasks[len(rows):]]
        changes = {**self.changes, **({} if self.most is None else {"--most": str(self.most)})}
        write_table(self.out, self.suite, self.model, changes, [*rows, *waiting])

    def _task(self, task: Task) -> Row:
        """The row of a task, after all of its settings have run.

        Raises:
            DataError, ConfigError: its files cannot be used.
            Stopped: as `run`.
        """
        if task.lacks:
            return left_out(self.suite, task, "left out", f"this project does not have {task.lacks}")
        directory = self.out / task.name
        prepared = prepare(self.suite, task, self.data, directory, self.most)
        found: dict[str, tuple[Point, dict[str, Any]]] = {}
        for point in points_of(self.suite, self.changes):
            run_dir = directory / point.name
            if (result := _result(run_dir)) is None:
                arguments = [f"finetune.from={self.start}", f"finetune.table={directory / TABLE}",
                             f"train.run_dir={run_dir}",
                             *arguments_of(self.suite, task, point, self.changes, prepared)]
                if error := self._run(run_dir, arguments):
                    return left_out(self.suite, task, "failed", f"{run_dir / LOG}: {error}")
                result = _result(run_dir)
            if result is None:
                return left_out(self.suite, task, "failed", f"{run_dir}: ended without a result")
            found[point.name] = point, result
        return row_of(self.suite, task, list(found.values()), prepared.notes)

    def _run(self, run_dir: Path, arguments: Sequence[str]) -> str | None:
        """Run one setting to its end; says why it failed.

        Raises:
            Stopped: it was told to stop.
        """
        self._wait_for_orphan(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        logger.info("running %s", run_dir)
        argv = [*(self.launch or (sys.executable,)), *FINETUNE, "--config", self.config, *arguments]
        try:
            with (run_dir / LOG).open("ab") as said:  # its own session: a Ctrl-C is this process's, which passes it on
                start = said.tell()
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                           start_new_session=True)
        except OSError as error:
            raise UserError(f"{argv[0]}: cannot be started ({error.strerror}): correct --launch") from None
        try:
            told = False
            while process.poll() is None:
                time.sleep(_POLL)
                if self.stop() and not told:
                    process.terminate()
                    told = True
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        status = process.returncode
        if status == 0:
            return None
        if told or status == EXIT_REQUEUE:
            raise Stopped
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return last_error(run_dir / LOG, start) or f"{ended}, and said nothing"


    def _wait_for_orphan(self, run_dir: Path) -> None:
        """A run whose command was killed outright notices that, saves and ends; until then it has its directory, or
        that of what stands beside it (cnn, scratch)."""
        for _ in range(int(_ORPHAN / _POLL)):
            if self.stop():
                raise Stopped
            if not any(in_use(path) for pattern in ("seed-*", "seed-*/*") for path in run_dir.glob(pattern)):
                return
            time.sleep(_POLL)


def _result(run_dir: Path) -> dict[str, Any] | None:
    """What a run that has ended has found; None: it has not ended."""
    path = run_dir / RESULT
    return read_found(path, "remove it, and the run is judged anew") if path.exists() else None
