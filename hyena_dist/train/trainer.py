"""The training run, read top to bottom: `Trainer.fit` is the loop, everything else serves it."""

import importlib.metadata
import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.errors import ConfigError, UserError
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch, TrainStream, validation_batches
from hyena_dist.data.tokenizer import IGNORE, PAD, split_window
from hyena_dist.engine.deepspeed import prepare_deepspeed
from hyena_dist.engine.deepspeed_config import deepspeed_config
from hyena_dist.model.context import choose_method
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.agree import agree, broadcast
from hyena_dist.train.checkpoint import (
    find_latest,
    load_checkpoint,
    prune,
    read_metadata,
    save_checkpoint,
    step_directory,
)
from hyena_dist.train.files import write_whole
from hyena_dist.train.metrics import Metrics, Row, peak_memory_bytes
from hyena_dist.train.optim import build_optimizer
from hyena_dist.train.report import write_report
from hyena_dist.train.schedules import learning_rate

logger = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2
"""At least two: the newest may be of a run that is about to turn out broken."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class _Pending:
    """An optimizer step whose numbers are still on their way from the device."""

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    seconds: float


class Trainer:
    """A run: its model, engine, data and what it writes.

    Args:
        config: already checked (`config.checks`).
        groups: of the initialised process group.
        device: of this rank, already selected.

    Raises:
        UserError: shards, checkpoint or run directory do not fit the configuration; the same on every rank.
    """

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self.run_dir = Path(config.train.run_dir)
        self.manifest = agree(lambda: Manifest.load(config.data.shards), groups)
        self.stream = TrainStream(self.manifest, seq_len=config.data.seq_len, seed=config.data.seed,
                                  rc_augment=config.data.rc_augment)
        self.val_seq_len = config.data.val_seq_len or config.data.seq_len
        self.step = 0
        self.position = self.stream.start()
        self.best_val_loss = math.inf
        self.val_loss = math.nan
        self._metrics: Metrics | None = None
        self._pending: deque[_Pending] = deque()

        resume = self._find_checkpoint()
        model = build_model(config, groups).to(device)
        self.token_multiple = model.token_multiple
        if groups.context.size > 1:
            rows = config.train.micro_batch_size * config.model.hidden_size // groups.tensor.size
            method = choose_method(config.parallel.context_method, rows=rows // config.parallel.overlap_groups,
                                   context=groups.context.size)
            logger.info("parallel.context_method=%s: %s", config.parallel.context_method, method)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.table = model.placement()
        ds_config = deepspeed_config(config.engine, groups, micro_batch_size=config.train.micro_batch_size,
                                     global_batch_size=config.train.global_batch_size,
                                     grad_clip=config.optim.grad_clip)
        self.engine = prepare_deepspeed(model, ds_config, groups, self.table,
                                        optimizer=build_optimizer(model, self.table, config.optim))
        self._started = time.monotonic()
        if resume is not None:
            with self._heard():
                self._resume(resume)

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way; afterwards write summary.json and report.png.

        Raises:
            TrainingError: the loss or the gradients are not finite.
            OSError: a checkpoint or the metrics could not be written.
        """
        train = self.config.train
        with ExitStack() as stack:
            stack.enter_context(self._heard())
            if self._is_first:
                self._metrics = Metrics(self.run_dir, last_step=self.step, total_steps=train.steps)
                stack.callback(self._metrics.close)
            batches = self._batches()
            while self.step < train.steps:
                self._pending.append(self._train_step(batches))
                self._report_steps(keep=1)  # one step late: the loop does not wait for the device
                last = self.step == train.steps
                if last or (train.eval_every and self.step % train.eval_every == 0):
                    self._report_steps(keep=0)
                    self._validate()
                if last or (train.save_every and self.step % train.save_every == 0):
                    self._report_steps(keep=0)  # nothing is saved before its check
                    self._save()
        if self._is_first:
            self._write_summary()
            write_report(self.run_dir)

    def _train_step(self, batches: Iterator[Batch]) -> _Pending:
        """Forward and backward of every micro-batch, then the update."""
        started = time.monotonic()
        micro_batches = [self._to_device(next(batches)) for _ in range(self.engine.accumulation_steps)]
        # The count of the whole step divides every micro-batch's sum, so that each token weighs the same.
        count = self._sum_over_data(sum(((targets != IGNORE).sum() for _, targets, _ in micro_batches),
                                        torch.zeros((), dtype=torch.int64, device=self.device))).clamp(min=1)
        total = torch.zeros((), device=self.device)
        self.engine.module.train()
        for input_ids, targets, windows in micro_batches:
            key = DropoutKey(self.config.train.seed, self.step, windows)
            loss, _ = token_loss(self.engine.module(input_ids, key), targets, self.groups.tensor)
            self.engine.backward(loss * (self.groups.data_context.size / count))
            total += loss.detach()
        lr = learning_rate(self.step, optim=self.config.optim, steps=self.config.train.steps)
        result = self.engine.step(lr)
        self.step += 1
        self.position = self.stream.advance(self.position, self.config.train.global_batch_size)
        loss = self._sum_over_data(total) / count
        return _Pending(self.step, lr, loss, result.grad_norm, time.monotonic() - started)

    def _report_steps(self, *, keep: int) -> None:
        """Read, check and write down all but the newest `keep` steps."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            loss, grad_norm = float(pending.loss), float(pending.grad_norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise TrainingError(f"step {pending.step}: loss {loss}, gradient norm {grad_norm}: its update was not "
                                    f"applied; last good checkpoint: {self._last_checkpoint()}. Lower optim.lr or "
                                    "optim.grad_clip and start afresh, or resume where the cause was not the model")
            self._write_row(pending.step, "train", loss, self.config.data.seq_len, lr=pending.lr, grad_norm=grad_norm,
                            tokens_per_second=self._tokens_per_step / pending.seconds)

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss per scored base of the validation split."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        for batch in validation_batches(self.manifest, seq_len=self.val_seq_len, dp_rank=self.groups.data.rank,
                                        batch_size=self.config.train.micro_batch_size, dp_size=self.groups.data.size):
            input_ids, targets, _ = self._to_device(batch)
            loss, count = token_loss(self.engine.module(input_ids), targets, self.groups.tensor)
            sums += torch.stack([loss.double(), count.double()])
        total, count = self._sum_over_data(sums).tolist()
        if not count:
            logger.warning("%s has no validation bases: validation is skipped", self.manifest.directory)
            return
        self.val_loss = total / count
        self.best_val_loss = min(self.best_val_loss, self.val_loss)
        self._write_row(self.step, "val", self.val_loss, self.val_seq_len)

    def _batches(self) -> Iterator[Batch]:
        train = self.config.train
        return self.stream.batches(self.position, micro_batch_size=train.micro_batch_size,
                                   global_batch_size=train.global_batch_size, dp_rank=self.groups.data.rank,
                                   dp_size=self.groups.data.size, num_workers=self.config.data.num_workers)

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

    def _write_row(self, step: int, split: str, loss: float, seq_len: int, *, lr: float | None = None,
                   grad_norm: float | None = None, tokens_per_second: float | None = None) -> None:
        if self._metrics is None:
            return
        self._metrics.write(Row(step=step, split=split, loss=loss, perplexity=_perplexity(loss),
                                tokens=step * self._tokens_per_step, seq_len=seq_len, lr=lr, grad_norm=grad_norm,
                                tokens_per_second=tokens_per_second, peak_memory_bytes=peak_memory_bytes(self.device)))

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.data.seq_len

    # Checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _save(self) -> None:
        metadata: dict[str, Any] = {
            "step": self.step,
            "identity": identity(self.config),
            "config": dump_config(self.config),
            "data": self.stream.state_dict(self.position),
            "val_loss": _finite(self.val_loss),
            "best_val_loss": _finite(self.best_val_loss),
            "seconds": self._seconds,
            "version": importlib.metadata.version("hyena-dist"),
        }
        save_checkpoint(step_directory(self._checkpoints, self.step), self.engine, self.table, self.groups, metadata)
        if self._is_first:
            prune(self._checkpoints, keep=CHECKPOINTS_KEPT)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None for a fresh start. Makes the run directory."""
        # The first rank's view: the others may look a moment later, or at a directory that is not shared.
        latest = broadcast(find_latest(self._checkpoints) if self._is_first else None, self.groups)
        return agree(lambda: self._choose(latest), self.groups)

    def _choose(self, latest: Path | None) -> Path | None:
        choice = self.config.train.resume
        if choice == "none" and latest is not None:
            raise ConfigError(f"train.run_dir={self.run_dir} holds a run already ({latest.name}): choose another "
                              "directory, or resume it with train.resume=auto")
        path = Path(choice) if choice not in ("auto", "none") else latest
        if path is not None:
            metadata = read_metadata(path)
            changed = differences(metadata["identity"], json.loads(json.dumps(identity(self.config))))
            if changed:
                raise ConfigError(f"{path} cannot be resumed with another configuration: {'; '.join(changed)}: set "
                                  "these keys as saved, or start afresh in another train.run_dir")
            if latest is not None and read_metadata(latest)["step"] > metadata["step"]:
                # Its own checkpoints would be older than those, which it would resume from and keep instead.
                raise ConfigError(f"train.resume={path} is older than {latest}, which is in train.run_dir: resume that "
                                  "one with train.resume=auto, or choose another train.run_dir")
        if self._is_first:
            self._make_run_dir()
        return path

    def _make_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"train.run_dir={self.run_dir}: no such directory can be made ({error.strerror}): choose "
                              "another") from error
        write_whole(self.run_dir / "config.yaml", lambda path: path.write_text(dump_config(self.config)))

    def _resume(self, path: Path) -> None:
        metadata = load_checkpoint(path, self.engine, self.table, self.groups)
        self.step = metadata["step"]
        self.position = self.stream.load_state_dict(metadata["data"])
        self.val_loss = math.nan if metadata["val_loss"] is None else metadata["val_loss"]
        self.best_val_loss = math.inf if metadata["best_val_loss"] is None else metadata["best_val_loss"]
        self._started -= metadata["seconds"]
        logger.info("resumed %s at step %d", path, self.step)

    def _last_checkpoint(self) -> str:
        return str(find_latest(self._checkpoints) or "none was saved yet")

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

    def _write_summary(self) -> None:
        groups, train = self.groups, self.config.train
        summary = {
            "final_val_perplexity": _finite(_perplexity(self.val_loss)),
            "best_val_perplexity": _finite(_perplexity(self.best_val_loss)),
            "steps": self.step,
            "tokens": self.step * self._tokens_per_step,
            "seconds": round(self._seconds, 3),
            "parameters": self.num_parameters,
            "world_size": groups.world.size,
            "layout": {"data": groups.data.size, "tensor": groups.tensor.size, "context": groups.context.size,
                       "engine": self.config.engine.name, "zero_stage": self.config.engine.zero_stage,
                       "precision": train.precision},
        }
        text = json.dumps(summary, indent=1) + "\n"
        write_whole(self.run_dir / "summary.json", lambda path: path.write_text(text))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
