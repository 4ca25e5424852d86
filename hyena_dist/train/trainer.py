"""The training run, read top to bottom: `Trainer.fit` is the loop, everything else serves it."""

import importlib.metadata
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.errors import TrainingError, UserError
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import Stage, tokens_after
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch, validation_batches
from hyena_dist.data.tokenizer import IGNORE, PAD, split_window
from hyena_dist.engine.protocol import StepResult
from hyena_dist.model.context import choose_method
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups, gloo_copy
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.agree import agree, broadcast
from hyena_dist.train.build_engine import build_engine
from hyena_dist.train.checkpoint import load_checkpoint, read_metadata
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.logs import RankLog, StepTimes
from hyena_dist.train.metrics import Metrics, Row, peak_memory_bytes
from hyena_dist.train.profile import StepProfiler
from hyena_dist.train.report import write_report
from hyena_dist.train.run_directory import RunDirectory, is_import
from hyena_dist.train.saver import CheckpointSaver
from hyena_dist.train.schedules import learning_rate
from hyena_dist.train.signals import StopSignal, write_requeue
from hyena_dist.train.startup import check_same_data
from hyena_dist.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

MOST_LOST_STEPS = 10
"""Steps that are not finite, one after the other, before a run that skips or rolls back gives up."""
SAVE_SECONDS = 600.0
"""What a save may take before the watchdog takes the rank for stuck."""


class _RollBack(Exception):
    """A step whose loss or gradients were not finite: go back to the last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step


@dataclass(frozen=True)
class _Pending:
    """An optimizer step whose numbers are still on their way from the device."""

    step: int
    stage: Stage
    lr: float
    loss: Tensor
    result: StepResult
    seconds: float


class Trainer:
    """A run: its model, engine, data and what it writes.

    Args:
        config: already checked (`config.checks`).
        groups: of the initialised process group.
        device: of this rank, already selected.
        shares: from length, micro-batch and tokens per second to MFU and share of the bandwidth, for the metrics.

    Raises:
        UserError: shards, checkpoint or run directory do not fit the configuration; the same on every rank.
    """

    def __init__(self, config: Config, groups: Groups, device: torch.device, *,
                 shares: Callable[..., tuple[float | None, float | None]] = lambda **_: (None, None)) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self._shares = shares
        self.step = 0
        self.best_val_loss = math.inf
        self.val_loss = math.nan
        self.val_step = 0
        """When `val_loss` was measured; 0: never."""
        self._metrics: Metrics | None = None
        self._pending: deque[_Pending] = deque()
        self._lost = 0
        """Steps in a row that were not finite."""
        self.run = RunDirectory(config, first=self._is_first)
        with ExitStack() as stack:
            agree(self.run.claim, groups)
            stack.callback(self.run.release)
            agree(lambda: stack.enter_context(RankLog(self.run.path, groups.world.rank)), groups)
            stack.enter_context(self._heard())
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
        # The first rank's view: the others may look a moment later, or at a directory that is not shared.
        latest = broadcast(agree(self.run.newest, groups), groups)
        resume = agree(lambda: self.run.start_from(latest), groups)
        agree(self.run.begin, groups)
        model = build_model(config, groups).to(self.device)
        self.token_multiple = model.token_multiple
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.table = model.placement()
        self._log_context_method()
        self.engine = build_engine(config, model, self.table, groups)
        self.saver = CheckpointSaver(self.run.checkpoints, groups)
        stack.callback(self.saver.close)
        self._started = time.monotonic()
        if resume is not None:
            self._resume(*resume)

    def fit(self) -> str | None:
        """Train to the last step, validating and saving on the way; afterwards write summary.json and report.png.

        A SIGTERM or SIGUSR1 to any rank, or the end of the launcher, ends the run early with a checkpoint of the last
        step and a requeue marker.

        Returns:
            Why it stopped before its end (`signals.REASONS`); None: it did not.

        Raises:
            TrainingError: the loss or the gradients are not finite, or the last checkpoint could not be written.
            OSError: the metrics could not be written.
        """
        with self._open, ExitStack() as stack:
            control = gloo_copy(self.groups.world)
            self.stop = stack.enter_context(StopSignal(control))
            self.watchdog = stack.enter_context(Watchdog(control, self.stop))
            self._times = StepTimes(control)
            if self._is_first:
                self._metrics = Metrics(self.run.path, last_step=self.step, total_steps=self.config.train.steps)
                stack.callback(self._metrics.close)
            self._profiler = stack.enter_context(StepProfiler(self.run.path, self.config.train.profile_steps,
                                                              self.groups.world.rank))
            reason = self._loop()
            self.watchdog.beat(allow=SAVE_SECONDS)
            failure = self.saver.wait()
            if reason is not None:
                if self._is_first:
                    write_requeue(self.run.path, reason, self.step)
                return reason
            if failure is not None:
                raise TrainingError(f"step {self.step}: {failure}; last good checkpoint: {self._last_checkpoint()}")
            if self._is_first:
                self.run.write_summary(
                    self.groups, final_val_perplexity=_finite(_perplexity(self.val_loss)),
                    best_val_perplexity=_finite(_perplexity(self.best_val_loss)), steps=self.step,
                    tokens=tokens_after(self.curriculum.stages, self.step), seconds=round(self._seconds, 3),
                    parameters=self.num_parameters)
                write_report(self.run.path)
        return None

    def _loop(self) -> str | None:
        """Every step to the last, or to the one after which all ranks stop; why they do."""
        train = self.config.train
        if self.step and _due(self.step, train.eval_every) and self.val_step != self.step:
            self._validate()  # the run was stopped before it could
        while self.step < train.steps:
            self._pending.append(self._train_step())
            self._profiler.step()
            self.watchdog.beat()
            reason = self.stop.agreed()
            last = self.step == train.steps
            stop = reason is not None and not last
            validate = not stop and (last or _due(self.step, train.eval_every))
            save = stop or last or _due(self.step, train.save_every)
            try:
                self._settle(keep=0 if validate or save else 1)  # one step late: the loop does not wait for the device
            except _RollBack as lost:
                self._roll_back(lost.step)
                continue
            if validate:
                save |= self._validate()
            if save:
                self._save()
            if stop:
                return reason
        return None

    def _train_step(self) -> _Pending:
        """Forward and backward of every micro-batch, then the update."""
        started = time.monotonic()
        stage, batches = self.curriculum.take()
        micro_batches = [self._to_device(batch) for batch in batches]
        loaded = time.monotonic()
        # The count of the whole step divides every micro-batch's sum, so that each token weighs the same.
        count = self._sum_over_data(sum(((targets != IGNORE).sum() for _, targets, _ in micro_batches),
                                        torch.zeros((), dtype=torch.int64, device=self.device))).clamp(min=1)
        total = torch.zeros((), device=self.device)
        counted = time.monotonic()
        forward = 0.0
        self.engine.module.train()
        self.engine.accumulation_steps = len(micro_batches)
        for input_ids, targets, windows in micro_batches:
            key = DropoutKey(self.config.train.seed, self.step, windows)
            loss, _ = token_loss(self.engine.module(input_ids, key), targets, self.groups.tensor)
            forward = forward or time.monotonic() - counted
            self.engine.backward(loss * (self.groups.data_context.size / count))
            total += loss.detach()
        lr = learning_rate(self.step, optim=self.config.optim, steps=self.config.train.steps)
        result = self.engine.step(lr)
        self.step += 1
        loss = self._sum_over_data(total) / count
        self._times.add(loading=loaded - started, forward=forward)
        return _Pending(self.step, stage, lr, loss, result, time.monotonic() - started)

    def _settle(self, *, keep: int) -> None:
        """Read, check and write down all but the newest `keep` steps. Nothing is saved before its check.

        Raises:
            TrainingError, _RollBack: a step was not finite, by `train.on_nonfinite`.
        """
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            loss, grad_norm = float(pending.loss), float(pending.result.grad_norm)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._lost = 0
                stage, rate = pending.stage, pending.stage.tokens_per_step / pending.seconds
                mfu, bandwidth = self._shares(seq_len=stage.seq_len, micro_batch_size=stage.micro_batch_size,
                                              tokens_per_second=rate)
                self._write_row(pending.step, "train", loss, stage.seq_len, lr=pending.lr, grad_norm=grad_norm,
                                tokens_per_second=rate, mfu=mfu, bandwidth=bandwidth)
            elif pending.result.overflow and self.engine.loss_scaler is not None:
                logger.info("step %d: gradients overflowed in fp16 and were not applied; the loss scale is now %g",
                            pending.step, self.engine.loss_scaler.scale)
            else:
                self._lose(pending.step, f"step {pending.step}: loss {loss}, gradient norm {grad_norm}: its update was "
                                         "not applied")

    def _lose(self, step: int, what: str) -> None:
        """Do as `train.on_nonfinite` says with a step that was not finite; the same on every rank, as its numbers."""
        self._lost += 1
        choice = self.config.train.on_nonfinite
        if choice == "stop" or self._lost > MOST_LOST_STEPS:
            again = f" ({self._lost} times in a row)" if self._lost > 1 else ""
            raise TrainingError(f"{what}{again}; last good checkpoint: {self._last_checkpoint()}. Lower optim.lr or "
                                "optim.grad_clip and start afresh, resume where the cause was not the model, or set "
                                "train.on_nonfinite")
        logger.warning("%s; train.on_nonfinite=%s", what, choice)
        if choice == "rollback":
            raise _RollBack(step)

    def _roll_back(self, lost: int) -> None:
        """To the last checkpoint, but on with the windows after those of step `lost`."""
        self._pending.clear()
        self.saver.wait()
        latest = broadcast(agree(self.run.newest, self.groups), self.groups)
        if latest is None:
            raise TrainingError(f"step {lost} was not finite, and there is no checkpoint to go back to: set "
                                "train.save_every, or train.on_nonfinite=skip")
        passed = self.curriculum.passed  # by earlier ways back: those windows must not come again either
        self._resume(latest, read_metadata(latest))
        self.curriculum.skip(steps=passed - self.curriculum.passed + lost - self.step)
        if self._metrics is not None:
            self._metrics.go_back(self.step)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Loss per scored base of the validation split. Returns whether it is the best so far."""
        seq_len = self.config.data.val_seq_len or self.config.data.seq_len
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        # A stage may train with more windows at a time, but of fewer tokens.
        for batch in validation_batches(self.manifest, seq_len=seq_len, dp_rank=self.groups.data.rank,
                                        batch_size=self.config.train.micro_batch_size, dp_size=self.groups.data.size):
            input_ids, targets, _ = self._to_device(batch)
            loss, count = token_loss(self.engine.module(input_ids), targets, self.groups.tensor)
            sums += torch.stack([loss.double(), count.double()])
            self.watchdog.beat()
        total, count = self._sum_over_data(sums).tolist()
        if not count:
            logger.warning("%s has no validation bases: validation is skipped", self.manifest.directory)
            return False
        self.val_loss, self.val_step = total / count, self.step
        self._write_row(self.step, "val", self.val_loss, seq_len)
        best, self.best_val_loss = self.best_val_loss, min(self.best_val_loss, self.val_loss)
        return self.val_loss < best

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(input_ids [B, l], targets [B, l], windows [B]), int64: this context rank's slice, on this rank's device."""
        input_ids, targets = split_window(batch.ids.to(self.device, non_blocking=True))
        axis, multiple = self.groups.context, self.token_multiple
        return (slice_tokens(input_ids, axis, multiple=multiple, fill=PAD),
                slice_tokens(targets, axis, multiple=multiple, fill=IGNORE),
                batch.windows.to(self.device, non_blocking=True))

    def _sum_over_data(self, tensor: Tensor) -> Tensor:
        if self.groups.data_context.size > 1:
            dist.all_reduce(tensor, group=self.groups.data_context.group)
        return tensor

    def _write_row(self, step: int, split: str, loss: float, seq_len: int, **of_training: float | None) -> None:
        if self._metrics is not None:
            numbers = {"lr": None, "grad_norm": None, "tokens_per_second": None, **of_training}
            self._metrics.write(Row(step=step, split=split, loss=loss, perplexity=_perplexity(loss), seq_len=seq_len,
                                    tokens=tokens_after(self.curriculum.stages, step), **numbers,
                                    peak_memory_bytes=peak_memory_bytes(self.device)))

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
            "version": importlib.metadata.version("hyena-dist"),
        }
        self.saver.save(self.engine, self.table, self.step, metadata)
        self.watchdog.beat()

    def _resume(self, path: Path, metadata: dict[str, Any]) -> None:
        load_checkpoint(path, self.engine, self.table, self.groups)
        if is_import(metadata):
            logger.info("starting from the weights of %s", path)
            return
        self.step = metadata["step"]
        self.curriculum.load_state_dict(metadata["data"])
        if metadata["val_loss"] is not None:
            self.val_loss, self.val_step = metadata["val_loss"], self.step
        self.best_val_loss = math.inf if metadata["best_val_loss"] is None else metadata["best_val_loss"]
        if self.engine.loss_scaler is not None and metadata["loss_scale"] is not None:
            self.engine.loss_scaler.load_state_dict(metadata["loss_scale"])
        self._started = time.monotonic() - metadata["seconds"]
        logger.info("resumed %s at step %d", path, self.step)

    def _last_checkpoint(self) -> str:
        self.saver.wait()
        newest = agree(self.run.newest, self.groups)
        return str(broadcast(newest, self.groups) or "none was saved yet")

    @property
    def _is_first(self) -> bool:
        return self.groups.world.rank == 0

    @property
    def _seconds(self) -> float:
        """Of training so far, over every start of the run."""
        return time.monotonic() - self._started

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Lets a user's mistake that only this rank meets, a damaged shard for one, be read though it is not the first
        rank, which alone speaks."""
        try:
            yield
        except UserError as error:
            if not self._is_first:
                logger.error("rank %d: %s", self.groups.world.rank, error)
            raise

    def _log_context_method(self) -> None:
        config, groups = self.config, self.groups
        if groups.context.size > 1:
            rows = config.train.micro_batch_size * config.model.hidden_size // groups.tensor.size
            method = choose_method(config.parallel.context_method, rows=rows // config.parallel.overlap_groups,
                                   context=groups.context.size)
            logger.info("parallel.context_method=%s: %s", config.parallel.context_method, method)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
