"""Saves checkpoints while the training goes on: a copy in host memory, which a thread writes.

The thread's collectives run on a gloo group of its own, so they never meet those of the training. A run that ends at
any moment, killed or not, leaves whole checkpoints only: they are written aside and renamed, and so are deletes.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hyena_dist.checkpoint.directory import is_sound, prune, step_directory
from hyena_dist.checkpoint.format import Exporter, Snapshot, take_snapshot, write_snapshot
from hyena_dist.checkpoint.metadata import seal
from hyena_dist.config.errors import ConfigError, UserError, agreed
from hyena_dist.engine.protocol import Table
from hyena_dist.parallel.groups import Groups, give_back, gloo_copy
from hyena_dist.runtime.agree import broadcast

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes a run's checkpoints in the background, one at a time, and deletes old ones; every method is collective.

    Args:
        checkpoints_dir: made by the first save; the same directory on every rank.
        groups: of the run. Making a saver makes a process group.
        keep: whole checkpoints kept besides the best, at least 2: the newest may be of a run that is about to break.
        keep_every: the steps whose checkpoints are kept for good are its multiples; 0: none.
        passed_over: checkpoints that the run finds damaged: they do not count as kept.
        saved: called by the first rank's thread with each checkpoint that is written.
    """

    def __init__(self, checkpoints_dir: str | Path, groups: Groups, *, keep: int = 2, keep_every: int = 0,
                 passed_over: set[Path] | None = None, saved: Callable[[Path], None] | None = None) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.failure: OSError | None = None
        """Why the last save wrote nothing; None if it did, or is still writing. After `wait` the same on all ranks."""
        self.seconds = 0.0
        """What the last save took, its writing included."""
        self._directory = Path(checkpoints_dir)
        self._keep, self._keep_every = keep, keep_every
        self._groups = groups
        self._own = replace(groups, world=gloo_copy(groups.world))
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._passed_over: set[Path] = set() if passed_over is None else passed_over
        self._saved = saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_select,
                                          initargs=(device,))
        self._writing: Future[OSError | None] | None = None

    def probe(self) -> None:
        """Write a checkpoint of next to nothing and delete it: what cannot be saved is better known before the first
        step than after many.

        Raises:
            ConfigError: on every rank, when a rank could not write.
        """
        path = self._directory / "step-probe.tmp-0"  # a killed one is deleted with the other leftovers
        content = Snapshot({f"probe/{self._own.world.rank}": torch.zeros(1)}, seal({"optimizer_step_count": 0}))
        try:
            write_snapshot(path, content, self._own)
        except OSError as error:
            raise agreed(ConfigError(f"no checkpoint can be written: {error}")) from error
        if self._is_first:
            shutil.rmtree(path, ignore_errors=True)

    def save(self, engine: Exporter, table: Table, step: int, metadata: Mapping[str, Any]) -> None:
        """Copy the engine's state and have it written; waits for the save before. What is saved already stays as it is.

        A save that fails raises nothing: it is logged, `failure` has it, and the checkpoints of before are untouched.
        """
        self.wait()
        self.failure = None
        path = step_directory(self._directory, step)
        if broadcast(self._is_first and _is_saved(path), self._own):
            return
        started = time.monotonic()
        snapshot = take_snapshot(engine, table, self._groups, metadata)
        self._writing = self._thread.submit(self._write, path, snapshot, started)

    def wait(self) -> OSError | None:
        """Wait until nothing is being written; return `failure`, the same on every rank.

        Raises what is no failed write but a defect or a lost peer.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.failure = writing.result()
        return self.failure

    def close(self) -> OSError | None:
        """`wait`, and end the thread: before the process groups are destroyed."""
        try:
            failure = self.wait()
        finally:
            self._thread.shutdown()
        give_back(self._own.world)
        return failure

    @property
    def _is_first(self) -> bool:
        return self._groups.world.rank == 0

    def _write(self, path: Path, snapshot: Snapshot, started: float) -> OSError | None:
        failure = None
        try:
            write_snapshot(path, snapshot, self._own)
        except OSError as error:  # the same on every rank
            failure = error
        self.seconds = time.monotonic() - started
        if self._is_first:
            try:
                if failure is not None:
                    logger.error("%s; the run goes on without it and tries again at its next save", failure)
                elif self._saved is not None:
                    self._saved(path)
                if failure is None:
                    self._passed_over.discard(path)
                # After a failure too: what a killed run left takes room.
                prune(self._directory, keep=self._keep, keep_every=self._keep_every, passed_over=self._passed_over)
            except (UserError, OSError) as error:
                logger.warning("old checkpoints may not be deleted: %s", error)
        return failure


def _select(device: int | None) -> None:
    """Let the thread use this rank's device, where a new thread has the first one, and a stream of its own: torch's
    writer waits for the current one, which by default is that of the training."""
    if device is not None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _is_saved(path: Path) -> bool:
    """Sound, not only whole: a run that has passed it over comes to its step again."""
    try:
        return path.exists() and is_sound(path)
    except UserError:  # it may not even be read: the save will say why
        return False
