"""The training loop, read top to bottom. What is learnt is the objective's; `session.py` puts the parts together."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.checkpoint.directory import amend_metadata, is_whole, step_directory
from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.config.errors import TrainingError
from hyena_dist.config.schema import Config
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.runtime.watchdog import Watchdog
from hyena_dist.train.ending import note_end, note_stop
from hyena_dist.train.history import Start
from hyena_dist.train.laps import Laps
from hyena_dist.train.ledger import Ledger
from hyena_dist.train.lost_steps import LostSteps, RollBack
from hyena_dist.train.profile import StepProfiler
from hyena_dist.train.progress import Countable
from hyena_dist.train.run_directory import RunDirectory
from hyena_dist.train.schedules import learning_rate
from hyena_dist.train.state import RunState

logger = logging.getLogger(__name__)
T = TypeVar("T")

SAVE_SECONDS = 600.0
"""What a save may take before the watchdog takes the rank for stuck."""
TRIED_BATCHES = 2
"""Of the validation, before the first step."""


class _Stopped(Exception):
    """A validation is given up, on all ranks, because the run stops."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Trainer:
    """Trains, validates and saves until the last step or until it is stopped. `session.open_trainer` makes one.

    Args:
        config: already checked (`config.checks`).
        device: of this rank.
        state: engine, objective and status, where the run is to go on.
    """

    def __init__(self, config: Config, groups: Groups, device: torch.device, state: RunState, *, run: RunDirectory,
                 saver: CheckpointSaver, stop: StopSignal, watchdog: Watchdog, ledger: Ledger, lost: LostSteps,
                 profiler: StepProfiler) -> None:
        self.config, self.groups, self.device, self.state = config, groups, device, state
        self.engine, self.objective, self.status = state.engine, state.objective, state.status
        self._run, self._saver, self._stop, self._watchdog = run, saver, stop, watchdog
        self._ledger, self._lost, self._profiler = ledger, lost, profiler

    def fit(self) -> str | None:
        """Train to the last step, validating and saving on the way; afterwards write summary.json and report.png.

        A signal to any rank (`signals`), or the end of the launcher, ends the run early with a checkpoint of the last
        step and a requeue marker.

        Returns:
            Why it stopped before its end (`signals.REASONS`); None: it did not.

        Raises:
            TrainingError: the loss or the gradients are not finite, or the last checkpoint could not be written.
            OSError: the metrics could not be written.
        """
        reason = self._loop()
        self._watchdog.beat(allow=SAVE_SECONDS)
        failure = self._saver.wait()
        if failure is not None:
            raise TrainingError(f"step {self.status.step}: {failure}; last good checkpoint: {self.last_checkpoint()}")
        agree(lambda: self._finish(reason), self.groups)
        return reason

    def _loop(self) -> str | None:
        """Every step to the last, or to the one after which all ranks stop; why they do."""
        train, status, begun = self.config.train, self.status, False
        if reason := self._stop.agreed_now():  # it came during the imports or the set-up
            self._stop.settled()
            return reason
        if not self._is_done():
            self._ledger.check(self.objective.validate(self.engine.module, self._first_batches))
        if status.step and status.val_step != status.step and self._validation_is_due():
            if reason := self._validate():  # the run was stopped before it could
                return reason
            agree(partial(self._note_validation, self.state.metadata()), self.groups)
        while not self._is_done():
            self._train_step()
            self._stop.settled()
            if not begun:
                agree(self._run.note_first_step, self.groups)
                begun = True
            self._profiler.step()
            reason = self._stop.agreed()
            validate = self._validation_is_due()
            save = status.step == train.steps or _due(status.step, train.save_every)
            try:  # one step late: the loop does not wait for the device
                self._ledger.settle(keep=0 if reason or validate or save else 1)
            except RollBack as lost:
                self._roll_back(lost.step)
                continue
            if reason or validate or save:
                agree(self._run.check_there, self.groups)
            if validate and not reason:
                best = status.best_val_loss
                reason = self._validate()
                save |= status.best_val_loss < best or self._is_done()
            if save or reason:
                self._save()
            if reason:
                return reason
        return None

    def _train_step(self) -> None:
        """Forward and backward of every micro-batch, then the update; nothing where no rank has anything to score."""
        started, laps = time.monotonic(), Laps(self.device)
        with self._watchdog.waiting_for("a batch", remedy=self.objective.no_batch):
            step = self.objective.next_step()
        loading = time.monotonic() - started
        # What the whole step scores divides every micro-batch's sum, so that all that is scored weighs the same. In
        # float64 it is exact for counts, and for weights as good as any.
        scored = self._sum_over_data(torch.full((), step.scored, dtype=torch.float64, device=self.device))
        # Only a rank whose own batches have nothing waits for the sum: the others know that it is not 0.
        empty = not step.scored and not float(scored)
        laps.mark()
        if not empty:
            lr = learning_rate(self.status.step, optim=self.config.optim, steps=self.config.train.steps)
            self.engine.module.train()
            self.engine.accumulation_steps = len(step.batches)
            total, divisor = torch.zeros((), device=self.device), scored.float()
            for number, batch in enumerate(step.batches):
                loss = self.objective.loss(self.engine.module, batch, self.status.step)
                if not number:
                    laps.mark()
                self.engine.backward(loss * (self.groups.data_context.size / divisor))
                total += loss.detach()
            result = self.engine.step(lr)
            mean = self._sum_over_data(total) / divisor
        self.status.step += 1
        self._watchdog.beat(step=True, allow=SAVE_SECONDS if step.new_shape else 0.0)
        laps.mark()
        if empty:  # with gradients of 0 momentum and decay would still move the weights
            logger.warning("step %d: %s: nothing was changed", self.status.step, self.objective.nothing_to_train)
        else:
            self._ledger.add(self.status.step, step, lr=lr, scored=scored, loss=mean, result=result, loading=loading,
                             laps=laps)

    def _sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over data and context ranks, in place."""
        if self.groups.data_context.size > 1:
            dist.all_reduce(tensor, group=self.groups.data_context.group)
        return tensor

    def _is_done(self) -> bool:
        """Whether the last step was taken, or the validation loss has not sunk for too long."""
        return self.status.step >= self.config.train.steps or 0 < self.config.train.patience <= self.status.stale

    def _validation_is_due(self) -> bool:
        step, train = self.status.step, self.config.train
        return step == train.steps or _due(step, train.eval_every)

    def _validate(self) -> str | None:
        """Measure the validation loss. Returns why all ranks stop; the measurement is then given up."""
        try:
            scores = self.objective.validate(self.engine.module, self._watched)
        except _Stopped as stopped:
            return stopped.reason
        if scores is None or not math.isfinite(scores.loss):
            logger.warning("%s: there is no validation loss", self.objective.nothing_to_validate)
        else:
            self.status.validated(scores.loss)
            self._ledger.validated(self.status.step, scores)
        return None

    def _watched(self, batches: Countable[T]) -> Iterator[T]:
        """The batches of a validation, until all ranks stop.

        Raises:
            _Stopped: they do; on every rank after the same batch.
        """
        for batch in self._watchdog.each(self._ledger.validating(batches), "a batch", remedy=self.objective.no_batch):
            yield batch
            self._watchdog.beat()
            if reason := self._stop.agreed():
                raise _Stopped(reason)

    def _first_batches(self, batches: Countable[T]) -> Iterator[T]:
        """Of a validation, before the first step: what does not fit fails now and not at the first validation."""
        yield from self.watched(islice(batches, TRIED_BATCHES))

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, while the watchdog sees that they come."""
        for batch in self._watchdog.each(batches, "a batch", remedy=self.objective.no_batch):
            yield batch
            self._watchdog.beat()

    def _save(self) -> None:
        self._watchdog.beat(allow=SAVE_SECONDS)
        self._saver.save(self.engine, self.objective.table, self.status.step, self.state.metadata())
        self._stop.save_seconds = max(self._stop.save_seconds, self._saver.seconds)  # of the saves before
        self._lost.saved()
        self._watchdog.beat()

    def _note_validation(self, metadata: dict[str, Any]) -> None:
        """Write a validation that was made up for into the checkpoint of this step, with the keys it was made with."""
        path = step_directory(self._run.checkpoints, self.status.step)
        if self._is_first and is_whole(path):
            amend_metadata(path, **metadata)

    def _roll_back(self, lost: int) -> None:
        """To the last checkpoint, but on with the batches after those of step `lost`."""
        self._watchdog.beat(allow=SAVE_SECONDS)
        self._saver.wait()
        latest = self._run.newest(self.groups)
        if latest is None:
            raise TrainingError(f"step {lost} was not finite, and there is no checkpoint to go back to: set "
                                "train.save_every, or train.on_nonfinite=skip")
        skipped = self.objective.skipped  # by earlier ways back: those batches must not come again either
        agree(latest.check_resumable, self.groups)
        self.state.restore(Start(latest))
        self.objective.skip(skipped - self.objective.skipped + lost - self.status.step)
        agree(partial(self._ledger.go_back, self.status.step), self.groups)
        self._watchdog.beat()

    def last_checkpoint(self) -> str:
        """Where the newest one is, in words. Collective."""
        self._saver.wait()
        latest = self._run.newest(self.groups)
        return "none was saved yet" if latest is None else str(latest.path)

    def _finish(self, reason: str | None) -> None:
        self._ledger.close()
        if self._is_first and reason is not None:
            note_stop(self._run, reason, self.status.step)
        elif self._is_first:
            note_end(self._run, self.state, self.groups, self._ledger.steady_rate)

    @property
    def _is_first(self) -> bool:
        return self.groups.world.rank == 0


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
