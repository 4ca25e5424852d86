"""The training run, read top to bottom: `Trainer.fit` is the loop, everything else serves it."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import psutil
import torch

from hyena_dist.checkpoint.directory import Checkpoint, amend_metadata, is_whole, step_directory
from hyena_dist.checkpoint.format import load_checkpoint
from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.config.errors import TrainingError
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.versions import own_version
from hyena_dist.config.warmup import tokens_after
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch
from hyena_dist.data.tokenizer import IGNORE
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.model.context import log_context_method
from hyena_dist.model.loss import perplexity, token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups, gloo_copy
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.logs import RankLog, StepTimes
from hyena_dist.runtime.requeue import clear_requeue, write_requeue
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.runtime.watchdog import Watchdog
from hyena_dist.train.build_engine import build_engine
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.laps import Laps, SteadyRate
from hyena_dist.train.lost_steps import LostSteps, RollBack
from hyena_dist.train.metrics import Metrics, Row, peak_memory_bytes
from hyena_dist.train.pending import Pending
from hyena_dist.train.profile import StepProfiler
from hyena_dist.train.progress import Countable
from hyena_dist.train.report import write_report
from hyena_dist.train.run_directory import RunDirectory, is_import
from hyena_dist.train.schedules import learning_rate
from hyena_dist.train.validation import Measured, Validation, has_scored, slicer, sum_over_data

logger = logging.getLogger(__name__)

SAVE_SECONDS = 600.0
"""What a save may take before the watchdog takes the rank for stuck."""


TRIED_BATCHES = 2
"""Of the validation, before the first step."""


NO_BATCH = ("a reader process stands still, or the file system of data.shards does not answer: look at both, and "
            "resume with the same command; DEEPSPEED_TIMEOUT sets how many minutes ranks wait")


class Trainer:
    """A run: its model, engine, data and what it writes.

    Args:
        config: already checked (`config.checks`).
        groups: of the initialised process group.
        device: of this rank, already selected.
        launchers: of this process (`launcher_processes`), found as early as can be; None: those of now.
        shares: from length, micro-batch and tokens per second to MFU and share of the bandwidth, for the metrics.

    Raises:
        UserError: shards, checkpoint or run directory do not fit the configuration; the same on every rank.
    """

    def __init__(self, config: Config, groups: Groups, device: torch.device, *,
                 launchers: Sequence[psutil.Process] | None = None,
                 shares: Callable[..., tuple[float | None, float | None]] = lambda **_: (None, None)) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self._launchers, self._shares = launchers, shares
        self.step = 0
        self.best_val_loss = math.inf
        self.val_loss = math.nan
        self.val_step = 0
        """When `val_loss` was measured; 0: never."""
        self._metrics: Metrics | None = None
        self._steady = SteadyRate()
        self._pending: deque[Pending] = deque()
        self._lost = LostSteps(config.train.on_nonfinite)
        self.run = RunDirectory(config, first=self._is_first)
        self._control = gloo_copy(groups.world)
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal(self._control))
            agree(self.run.claim, groups)
            stack.callback(self.run.release)
            agree(lambda: stack.enter_context(RankLog(self.run.path, groups.world.rank)), groups)
            self._set_up(stack)
            self._open = stack.pop_all()

    def _set_up(self, stack: ExitStack) -> None:
        """Data, model, engine, and the state of a checkpoint to go on from."""
        config, groups = self.config, self.groups
        self.manifest = agree(lambda: Manifest.load(config.data.shards), groups)
        check_same_data(self.manifest.identity, groups.world)
        self.curriculum = agree(lambda: Curriculum(self.manifest, config, dp_rank=groups.data.rank,
                                                   dp_size=groups.data.size), groups)
        stack.callback(self.curriculum.close)
        resume = self.run.start_from(self.run.newest(groups), groups)
        model = build_model(config, groups).to(self.device)
        self._take = slicer(groups, self.device, token_multiple=model.token_multiple)
        self.validation = Validation(config, self.manifest, self._take, groups, self.device)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.table = model.placement()
        log_context_method(config, groups)
        self.engine = build_engine(config, model, self.table, groups)
        self.saver = CheckpointSaver(self.run.checkpoints, groups, passed_over=self.run.passed_over,
                                     saved=self.run.note_saved)
        stack.callback(self.saver.close)
        self.saver.probe()
        self._started = time.monotonic()
        if resume is not None:
            self._resume(resume)
        agree(lambda: self.run.begin(afresh=resume is None), groups)  # not before all that could refuse

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
        with self._open, ExitStack() as stack:
            self.watchdog = stack.enter_context(Watchdog(self._control, self.stop, launchers=self._launchers))
            self._times = StepTimes(self._control)
            agree(lambda: self._open_metrics(stack), self.groups)
            self._profiler = stack.enter_context(StepProfiler(self.run.path, self.config.train.profile_steps,
                                                              self.groups.world.rank))
            reason = self._loop()
            self.watchdog.beat(allow=SAVE_SECONDS)
            failure = self.saver.wait()
            if failure is not None:
                raise TrainingError(f"step {self.step}: {failure}; last good checkpoint: {self._last_checkpoint()}")
            agree(lambda: self._finish(reason), self.groups)
        return reason

    def _open_metrics(self, stack: ExitStack) -> None:
        if self._is_first:
            self._metrics = Metrics(self.run.path, last_step=self.step, total_steps=self.config.train.steps,
                                    now=time.time(), settings=asdict(self.config), wandb=self.config.train.wandb)
            stack.callback(self._metrics.close)

    def _loop(self) -> str | None:
        """Every step to the last, or to the one after which all ranks stop; why they do."""
        train = self.config.train
        if reason := self.stop.agreed_now():  # it came during the imports or the set-up
            self.stop.settled()
            return reason
        if self.step < train.steps:
            self._measure(most=TRIED_BATCHES)  # what does not fit fails now and not at the first validation
        if self.step and self.val_step != self.step and (self.step == train.steps or _due(self.step, train.eval_every)):
            if reason := self._validate():  # the run was stopped before it could
                return reason
            agree(self._note_validation, self.groups)
        while self.step < train.steps:
            self._train_step()
            self.stop.settled()
            self._profiler.step()
            reason = self.stop.agreed()
            last = self.step == train.steps
            validate = last or _due(self.step, train.eval_every)
            save = last or _due(self.step, train.save_every)
            try:  # one step late: the loop does not wait for the device
                self._settle(keep=0 if reason or validate or save else 1)
            except RollBack as lost:
                self._roll_back(lost.step)
                continue
            if reason or validate or save:
                agree(self.run.check_there, self.groups)
            if validate and not reason:
                best = self.best_val_loss
                reason = self._validate()
                save |= self.best_val_loss < best
            if save or reason:
                self._save()
            if reason:
                return reason
        return None

    def _train_step(self) -> None:
        """Forward and backward of every micro-batch, then the update; nothing where no rank has a base to score."""
        started, laps = time.monotonic(), Laps(self.device)
        with self.watchdog.waiting_for("a batch", remedy=NO_BATCH):
            stage, batches = self.curriculum.take()
        micro_batches = [self._take(batch) for batch in batches]
        loaded = time.monotonic()
        # The count of the whole step divides every micro-batch's sum, so that each token weighs the same.
        count = torch.stack([(targets != IGNORE).sum() for _, targets, _ in micro_batches]).sum()
        count = sum_over_data(count, self.groups)
        # Only a rank whose own windows have nothing waits for the sum: the others know that it is not 0.
        empty = not any(has_scored(batch) for batch in batches) and not int(count)
        laps.mark()
        lr = learning_rate(self.step, optim=self.config.optim, steps=self.config.train.steps)
        if not empty:
            self.engine.module.train()
            self.engine.accumulation_steps = len(micro_batches)
            total = torch.zeros((), device=self.device)
            for number, (input_ids, targets, windows) in enumerate(micro_batches):
                key = DropoutKey(self.config.train.seed, self.step, windows)
                loss, _ = token_loss(self.engine.module(input_ids, key), targets, self.groups.tensor)
                if not number:
                    laps.mark()
                self.engine.backward(loss * (self.groups.data_context.size / count))
                total += loss.detach()
            result = self.engine.step(lr)
            loss = sum_over_data(total, self.groups) / count
        self.step += 1
        changes = self.curriculum.stage is not stage  # the first step of the next stage takes longer
        self.watchdog.beat(step=True, allow=SAVE_SECONDS if changes else 0.0)
        laps.mark()
        if empty:  # with gradients of 0 momentum and decay would still move the weights
            logger.warning("step %d: its windows have no base to score (A, C, G, T): nothing was changed", self.step)
        else:
            self._pending.append(Pending(self.step, stage, lr, count, loss, result, loaded - started, laps))

    def _settle(self, *, keep: int) -> None:
        """Read, check and write down all but the newest `keep` steps. Nothing is saved before its check.

        Raises:
            TrainingError, RollBack: a step was not finite, by `train.on_nonfinite`.
        """
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            loss, grad_norm = float(pending.loss), float(pending.result.grad_norm)
            self._times.add(loading=pending.loading, forward=pending.laps.seconds(1, 2))
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._lost.finite()
                stage = pending.stage
                seconds = pending.laps.seconds(0, 3)
                rate = stage.tokens_per_step / seconds
                mfu, bandwidth = self._shares(seq_len=stage.seq_len, micro_batch_size=stage.micro_batch_size,
                                              tokens_per_second=rate)
                steady = self._steady.add(stage=stage.index, tokens=stage.tokens_per_step, seconds=seconds)
                self._write_row(pending.step, "train", loss, int(pending.scored), stage.seq_len, lr=pending.lr,
                                grad_norm=grad_norm, tokens_per_second=rate, mfu=mfu, bandwidth=bandwidth,
                                steady_tokens_per_second=steady)
            elif pending.result.overflow and self.engine.loss_scaler is not None:
                logger.info("step %d: gradients overflowed in fp16 and were not applied; the loss scale is now %g",
                            pending.step, self.engine.loss_scaler.scale)
            else:
                update = "was applied" if pending.result.applied else "was not applied"
                self._lost.lose(pending.step, f"step {pending.step}: loss {loss}, gradient norm {grad_norm}: its "
                                              f"update {update}", self._last_checkpoint)

    def _roll_back(self, lost: int) -> None:
        """To the last checkpoint, but on with the windows after those of step `lost`."""
        self._pending.clear()
        self.watchdog.beat(allow=SAVE_SECONDS)
        self.saver.wait()
        latest = self.run.newest(self.groups)
        if latest is None:
            raise TrainingError(f"step {lost} was not finite, and there is no checkpoint to go back to: set "
                                "train.save_every, or train.on_nonfinite=skip")
        passed = self.curriculum.passed  # by earlier ways back: those windows must not come again either
        agree(latest.check_resumable, self.groups)
        self._resume(latest)
        self.curriculum.skip(steps=passed - self.curriculum.passed + lost - self.step)
        agree(lambda: self._metrics.go_back(self.step, now=time.time()) if self._metrics else None, self.groups)
        self.watchdog.beat()

    def _measure(self, most: int | None = None) -> tuple[Measured | None, str | None]:
        """Run over the validation windows, or the first batches of them. Returns what was measured, or why all ranks
        stop; the measurement is then given up."""
        reasons: list[str] = []

        def stop() -> bool:
            self.watchdog.beat()
            reasons.extend(filter(None, [self.stop.agreed() if most is None else None]))
            return bool(reasons)

        def watched(batches: Countable[Batch]) -> Iterator[Batch]:
            shown = batches if most or self._metrics is None else self._metrics.validating(batches)
            return self.watchdog.each(shown, "a batch", remedy=NO_BATCH)

        measured = self.validation.measure(self.engine.module, stop=stop, watched=watched, most=most)
        return measured, reasons[0] if reasons else None

    def _validate(self) -> str | None:
        """Measure the validation loss and write it down. Returns why all ranks stop; then there is none."""
        measured, reason = self._measure()
        if measured is not None and not math.isfinite(measured.loss):
            logger.warning("%s has no validation bases, or the model gives no number: there is no validation loss",
                           self.manifest.directory)
        elif measured is not None:
            self.val_loss, self.val_step = measured.loss, self.step
            self.best_val_loss = min(self.best_val_loss, measured.loss)
            self._write_row(self.step, "val", *measured, self.validation.seq_len)
        return reason

    def _write_row(self, step: int, split: str, loss: float, scored: int, seq_len: int, *, lr: float | None = None,
                   grad_norm: float | None = None, tokens_per_second: float | None = None,
                   **extras: float | None) -> None:
        if self._metrics is not None:
            self._metrics.write(Row(
                step=step, split=split, loss=loss, perplexity=perplexity(loss), seq_len=seq_len, scored=scored, lr=lr,
                tokens=tokens_after(self.curriculum.stages, step), grad_norm=grad_norm, time=time.time(),
                epoch=self.curriculum.epochs_after(step), tokens_per_second=tokens_per_second,
                peak_memory_bytes=peak_memory_bytes(self.device),
                extras={name: value for name, value in extras.items() if value is not None}))

    def _save(self) -> None:
        self.watchdog.beat(allow=SAVE_SECONDS)
        scaler = self.engine.loss_scaler
        metadata: dict[str, Any] = {
            "step": self.step,
            "identity": identity(self.config),
            "config": dump_config(self.config),
            "data": self.curriculum.state_dict(),
            "val_loss": _finite(self.val_loss) if self.val_step == self.step else None,
            "best_val_loss": _finite(self.best_val_loss),
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "seconds": self._seconds,
            "version": own_version(),
        }
        self.saver.save(self.engine, self.table, self.step, metadata)
        self._lost.saved()
        self.watchdog.beat()

    def _note_validation(self) -> None:
        """Write a validation that was made up for into the checkpoint of this step."""
        path = step_directory(self.run.checkpoints, self.step)
        if self._is_first and is_whole(path):
            amend_metadata(path, val_loss=_finite(self.val_loss), best_val_loss=_finite(self.best_val_loss))

    def _resume(self, checkpoint: Checkpoint) -> None:
        metadata = load_checkpoint(checkpoint, self.engine, self.table, self.groups)
        if is_import(metadata):
            logger.info("starting from the weights of %s", checkpoint.path)
            return
        self.step = metadata["step"]
        self.curriculum.load_state_dict(metadata["data"])
        val_loss, best = metadata["val_loss"], metadata["best_val_loss"]
        self.val_loss, self.val_step = (math.nan, 0) if val_loss is None else (val_loss, self.step)
        self.best_val_loss = math.inf if best is None else best
        if self.engine.loss_scaler is not None:
            self.engine.loss_scaler.load_state_dict(metadata["loss_scale"] or LossScaler().state_dict())
        self._started = time.monotonic() - metadata["seconds"]
        logger.info("resumed %s at step %d", checkpoint.path, self.step)

    def _last_checkpoint(self) -> str:
        self.saver.wait()
        latest = self.run.newest(self.groups)
        return "none was saved yet" if latest is None else str(latest.path)

    def _finish(self, reason: str | None) -> None:
        """What the first rank writes at the end: the marker of a run that is to be started again, or the summary."""
        if self._metrics is None:
            return
        self._metrics.close()
        if reason is not None:
            write_requeue(self.run.path, reason, self.step)
            return
        self.run.write_summary(
            self.groups, final_val_perplexity=_finite(perplexity(self.val_loss)),
            best_val_perplexity=_finite(perplexity(self.best_val_loss)), steps=self.step,
            tokens=tokens_after(self.curriculum.stages, self.step), seconds=round(self._seconds, 3),
            parameters=self.num_parameters)
        clear_requeue(self.run.path)
        write_report(self.run.path)

    @property
    def _is_first(self) -> bool:
        return self.groups.world.rank == 0

    @property
    def _seconds(self) -> float:
        """Of training so far, over every start of the run."""
        return time.monotonic() - self._started


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
