"""The numbers of optimizer steps on their way to the metrics: read one step late, checked, written down."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import StepResult
from hyena_dist.model.loss import perplexity
from hyena_dist.runtime.logs import StepTimes
from hyena_dist.runtime.memory import peak_memory_bytes
from hyena_dist.train.laps import Laps, SteadyRate
from hyena_dist.train.late import LateNumbers
from hyena_dist.train.lost_steps import LostSteps
from hyena_dist.train.metrics import Metrics, Row, extra_names
from hyena_dist.train.objective import Objective, Scores, Step
from hyena_dist.train.progress import Countable

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Pending:
    """An optimizer step whose numbers are still on their way from the device."""

    step: int
    work: Step
    lr: float
    numbers: LateNumbers
    result: StepResult
    loading: float
    """Seconds in which the host waited for the batches."""
    laps: Laps
    """Of the device: the start of the step, of its first forward pass, the end of that, and of the step."""


class Ledger:
    """Steps that were done, and their rows.

    Args:
        metrics: of the first rank; None on the others.
        times: compares what ranks need for their own part of a step.
        lost: what becomes of a step that is not finite.
        objective: says how many tokens and epochs a step has seen, how much of the devices it uses, and which metrics
            its validations find.
        last_checkpoint: names it, for the message about a lost step.
    """

    def __init__(self, device: torch.device, metrics: Metrics | None, times: StepTimes, lost: LostSteps,
                 *, loss_scaler: LossScaler | None, objective: Objective,
                 last_checkpoint: Callable[[], str]) -> None:
        self._device, self._metrics, self._times, self._lost = device, metrics, times, lost
        self._utilisation, self._loss_scaler, self._objective = objective.utilisation(), loss_scaler, objective
        self._last_checkpoint = last_checkpoint
        self._steady = SteadyRate()
        self._pending: deque[_Pending] = deque()

    @property
    def steady_rate(self) -> float | None:
        """Tokens per second of the latest steps; None: there were none since the start, or too few."""
        return self._steady.latest

    def add(self, step: int, work: Step, *, lr: float, scored: Tensor, loss: Tensor, result: StepResult, loading: float,
            laps: Laps) -> None:
        """Note a step that the device was given.

        Args:
            scored: positions, or their weight, that `loss` is the mean of, over all ranks; 0-dim, as `loss`.
        """
        numbers = LateNumbers({"loss": loss, "grad_norm": result.grad_norm, "scored": scored})
        self._pending.append(_Pending(step, work, lr, numbers, result, loading, laps))

    def settle(self, *, keep: int) -> None:
        """Read, check and write down all but the newest `keep` steps. Nothing is saved before its check.

        Raises:
            TrainingError, RollBack: a step was not finite, by `train.on_nonfinite`.
        """
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            numbers = pending.numbers.read()
            self._times.add(loading=pending.loading, forward=pending.laps.seconds(1, 2))
            if math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
                self._lost.finite()
                self._write_step(pending, numbers)
            elif pending.result.overflow and self._loss_scaler is not None:
                logger.info("step %d: gradients overflowed in fp16 and were not applied; the loss scale is now %g",
                            pending.step, self._loss_scaler.scale)
            else:
                update = "was applied" if pending.result.applied else "was not applied"
                self._lost.lose(pending.step, f"step {pending.step}: loss {numbers['loss']}, gradient norm "
                                              f"{numbers['grad_norm']}: its update {update}", self._last_checkpoint)

    def check(self, scores: Scores | None) -> None:
        """That what a validation found can be written down; on every rank, before the first step."""
        if scores is not None:
            unknown = scores.extras.keys() - extra_names(self._objective.extras)
            assert not unknown, f"metrics that the objective does not declare, or fields of a row: {sorted(unknown)}"

    def validated(self, step: int, scores: Scores) -> None:
        """Write the row of a validation."""
        self.check(scores)
        self._write(step, "val", scores.loss, scores.scored, scores.seq_len, extras=scores.extras)

    def go_back(self, step: int) -> None:
        """Forget the steps past this one, and drop their rows; on the first rank."""
        self._pending.clear()
        if self._metrics is not None:
            self._metrics.go_back(step, now=time.time())

    def close(self) -> None:
        """Raises OSError: rows could not be written to the end."""
        if self._metrics is not None:
            self._metrics.close()

    def validating(self, batches: Countable[T]) -> Iterable[T]:
        """The batches of a validation; the first rank shows how far it is."""
        return batches if self._metrics is None else self._metrics.validating(batches)

    def _write_step(self, pending: _Pending, numbers: Mapping[str, float]) -> None:
        work, seconds = pending.work, pending.laps.seconds(0, 3)
        rate = work.tokens / seconds
        steady = self._steady.add(stage=work.stage, tokens=work.tokens, seconds=seconds)
        shares = {} if self._utilisation is None else self._utilisation.shares(
            seq_len=work.seq_len, micro_batch_size=work.micro_batch_size, tokens_per_second=rate)._asdict()
        extras = {name: value for name, value in {**shares, "steady_tokens_per_second": steady}.items()
                  if value is not None}
        self._write(pending.step, "train", numbers["loss"], numbers["scored"], work.seq_len, lr=pending.lr,
                    grad_norm=numbers["grad_norm"], tokens_per_second=rate, extras=extras)

    def _write(self, step: int, split: str, loss: float, scored: float, seq_len: int, *, extras: Mapping[str, float],
               lr: float | None = None, grad_norm: float | None = None, tokens_per_second: float | None = None) -> None:
        if self._metrics is not None:
            self._metrics.write(Row(
                step=step, split=split, loss=loss, seq_len=seq_len, lr=lr,
                perplexity=perplexity(loss) if self._objective.has_perplexity else None,
                scored=int(scored) if float(scored).is_integer() else scored,  # a count is written as one
                tokens=self._objective.tokens(step), grad_norm=grad_norm, time=time.time(),
                epoch=self._objective.epochs(step), tokens_per_second=tokens_per_second,
                peak_memory_bytes=peak_memory_bytes(self._device), extras=extras))
