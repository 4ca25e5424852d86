"""Fine-tuning, the second objective: the label of every sequence of a table, from a pretrained backbone."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection, words_of
from hyena_dist.data.labelled import Labelled, encoded
from hyena_dist.data.tokenizer import PAD, tokenizer_of
from hyena_dist.engine.protocol import Table
from hyena_dist.model.depth import scaled_by_depth
from hyena_dist.model.lora import add_adapters
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import tensor_share
from hyena_dist.model.pooled import PooledModel
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.objective import Scores, Step, Watched
from hyena_dist.train.predictions import METRICS, Predictions, scores_of

logger = logging.getLogger(__name__)

FINETUNING = "finetuning"
_WIDTH = 64
"""Rows are padded to a multiple of so many tokens, so that there are few shapes."""


@dataclass(frozen=True)
class Rows:
    """Sequences of one micro-batch on one rank."""

    numbers: Tensor
    """int64 [B], of each sequence in its split; -1 where a row only fills the batch."""
    ids: Tensor
    """int64 [B, l], this context rank's slice, padded on the right."""
    lengths: Tensor
    """int64 [B], tokens of each whole sequence."""
    targets: Tensor
    share: float
    """Of the loss that this rank counts: one P-th over P context ranks."""

    @property
    def scored(self) -> float:
        return self.share * float((self.numbers >= 0).sum())


class Drawn(NamedTuple):
    """A sequence of a split as it is shown once."""

    number: int
    reverse: bool
    """Whether it is its other strand."""
    epoch: int = -1
    """Of training."""


class Finetuning:
    """The objective of a run of `launchers/finetune.py`. Collective.

    Args:
        config: already checked; its model is that of the pretrained weights.
        labelled: the sequences, the same on every rank.
        weights: of the whole pretrained backbone by name; None: fresh ones.

    Raises:
        UserError: the ranks read different sequences.
    """

    name = FINETUNING
    no_batch = "the sequences lie in this process's memory: look at the machine"
    nothing_to_train = "there is no sequence in it"

    def __init__(self, config: Config, groups: Groups, device: torch.device, *, labelled: Labelled,
                 weights: Mapping[str, Tensor] | None) -> None:
        self._config, self._groups, self._device, self._labelled = config, groups, device, labelled
        self._section, self._digest = config.finetune, labelled.digest()
        self.nothing_to_validate = "the model gives no number for the sequences of valid"
        self.extras: Collection[str] = METRICS[labelled.task]
        check_same_data(self._digest, groups.world)
        model = self._build(weights)
        self._multiple = model.token_multiple
        self.module: nn.Module = model.to(device)
        self.table: Table = scaled_by_depth(model.placement(), config.model.num_layers, self._section.lr_decay)
        tokenizer = tokenizer_of(config.model)
        self._ids = {name: encoded(examples, tokenizer) for name, examples in labelled.splits.items()}
        self._reversed = {name: encoded(examples, tokenizer, reverse=True) for name, examples in labelled.splits.items()
                          } if self._section.rc != "none" else {}
        self._targets = {name: labelled.targets(name) for name in labelled.splits}
        self._scale = _scale_of(self._targets["train"]) if labelled.task == "regression" else (0.0, 1.0)
        self._taken = self.skipped = 0
        self._epoch = -1
        """That `_order` and `_strands` are of."""
        self._order, self._strands = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)

    def _build(self, weights: Mapping[str, Tensor] | None) -> PooledModel:
        """The model that answers, on the CPU."""
        config, groups, section = self._config, self._groups, self._section
        backbone = build_model(config, groups)
        if weights is not None:
            _fill(backbone, weights, groups)
        adapt(backbone, section, seed=config.train.seed)
        return PooledModel(backbone, outputs=self._labelled.outputs, pooling=section.pooling, seed=config.train.seed)

    def utilisation(self) -> None:
        """There is no formula for sequences of many lengths."""

    def next_step(self) -> Step[Rows]:
        train, data = self._config.train, self._groups.data
        first = (self._taken + self.skipped) * train.global_batch_size
        share = train.global_batch_size // data.size
        drawn = [self._drawn(first + data.rank * share + i) for i in range(share)]
        self._taken += 1
        micro = train.micro_batch_size
        batches = [self._rows("train", drawn[i : i + micro]) for i in range(0, share, micro)]
        return Step(batches, stage=0, seq_len=self._config.data.seq_len, micro_batch_size=micro,
                    tokens=train.global_batch_size * self._config.data.seq_len)

    def _drawn(self, place: int) -> Drawn:
        """The sequence at a place in the order of training. Each epoch is a permutation of its own, and the next begins
        behind it, in the same batch where that is not full."""
        epoch, index = divmod(place, len(self._ids["train"]))
        if epoch != self._epoch:
            generator, count = np.random.default_rng([self._config.train.seed, epoch]), len(self._ids["train"])
            self._order, self._strands = generator.permutation(count), generator.random(count) < 0.5
            self._epoch = epoch
        return Drawn(int(self._order[index]), bool(self._strands[index]) and self._section.rc != "none", epoch)

    def _tokens(self, split: str, drawn: Drawn) -> np.ndarray:
        """What the model reads of a sequence."""
        return (self._reversed if drawn.reverse else self._ids)[split][drawn.number]

    def _rows(self, split: str, drawn: Sequence[Drawn], fill: int = 0) -> Rows:
        """The rows of these sequences, and `fill` rows of no sequence behind them."""
        rows = [self._tokens(split, one) for one in drawn]
        rows += [np.full(1, PAD)] * fill
        width = -(-max(map(len, rows)) // _WIDTH) * _WIDTH
        width = min(width, self._config.model.max_seq_len)
        first, tokens, _ = part_of_window(width, self._groups.context, multiple=self._multiple)
        ids = np.full((len(rows), tokens), PAD, dtype=np.int64)
        for row, sequence in zip(ids, rows, strict=True):
            part = sequence[first : first + tokens]
            row[: len(part)] = part
        numbers = [one.number for one in drawn] + [-1] * fill
        return Rows(torch.tensor(numbers), torch.from_numpy(ids), torch.tensor([len(row) for row in rows]),
                    self._answers(split, numbers), 1 / self._groups.context.size)

    def _answers(self, split: str, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """The targets of rows as the loss takes them; what stands at rows of no sequence is not looked at."""
        targets = torch.from_numpy(self._targets[split][np.maximum(numbers, 0)])
        if self._labelled.task == "classification":
            return targets
        mean, deviation = self._scale
        return ((targets - mean) / deviation).float()

    def loss(self, module: nn.Module, batch: Rows, step: int) -> Tensor:
        key = DropoutKey(self._config.train.seed, step, batch.numbers.to(self._device))
        answers = module(batch.ids.to(self._device), batch.lengths.to(self._device), key)
        return batch.share * self._losses(answers, batch.targets.to(self._device)).sum()

    def _losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        """[B], in nats, or squared deviations."""
        if self._labelled.task == "classification":
            return F.cross_entropy(answers, targets, reduction="none")
        if self._labelled.task == "multilabel":
            return F.binary_cross_entropy_with_logits(answers, targets.to(answers.dtype), reduction="none").mean(-1)
        return (answers[:, 0] - targets.to(answers.dtype)).square()

    def validate(self, module: nn.Module, watched: Watched[Rows]) -> Scores | None:
        answers, seen = self._answer(module, "valid", watched)
        loss = float(self._losses(answers[seen], self._answers("valid", np.flatnonzero(seen))).mean())
        found = scores_of(self._labelled.task, self._in_units(answers[seen]), self._targets["valid"][seen])
        extras = {name: value for name, value in found.items() if value is not None}
        return Scores(loss, int(seen.sum()), self._config.data.seq_len, extras)

    def predict(self, module: nn.Module, split: str, watched: Watched[Rows]) -> Predictions:
        """What the model says of every sequence of a split; the same on every rank. Collective."""
        answers, seen = self._answer(module, split, watched)
        assert seen.all()
        return Predictions(self._labelled, split, self._in_units(answers))

    def _in_units(self, answers: Tensor) -> np.ndarray:
        """Logits, or numbers in the units of the labels."""
        mean, deviation = self._scale
        return (answers * deviation + mean).numpy()

    @torch.no_grad()
    def _answer(self, module: nn.Module, split: str, watched: Watched[Rows]) -> tuple[Tensor, np.ndarray]:
        """float64 [n, outputs] of a split, and which sequences were among the batches that were watched."""
        count = len(self._ids[split])
        strands = (False, True) if self._section.rc == "average" else (False,)
        found = torch.zeros(count, self._labelled.outputs + 1, dtype=torch.float64, device=self._device)
        module.eval()
        for rows in watched(_Batches(self, split, strands)):
            answers = module(rows.ids.to(self._device), rows.lengths.to(self._device)).double()
            real = rows.numbers >= 0
            numbers = rows.numbers[real].to(self._device)
            ones = torch.ones(len(numbers), 1, dtype=torch.float64, device=self._device)
            found.index_add_(0, numbers, torch.cat([answers[real.to(self._device)], ones], 1))
        if self._groups.data.size > 1:
            dist.all_reduce(found, group=self._groups.data.group)
        found = found.cpu()
        seen = found[:, -1] > 0
        return found[:, :-1] / found[:, -1:].clamp(min=1), seen.numpy()

    def batches(self, split: str, strand: bool) -> Iterator[Rows]:
        """This data rank's batches of a split; as many on every rank, all of the same number of rows."""
        data, micro = self._groups.data, self._config.train.micro_batch_size
        for first in range(0, len(self._ids[split]), micro * data.size):
            start = first + data.rank * micro
            numbers = range(start, min(start + micro, len(self._ids[split])))
            yield self._rows(split, [Drawn(number, strand) for number in numbers], fill=micro - len(numbers))

    def batch_count(self, split: str) -> int:
        """How many `batches` gives."""
        return -(-len(self._ids[split]) // (self._config.train.micro_batch_size * self._groups.data.size))

    def tokens(self, step: int) -> int:
        return step * self._config.train.global_batch_size * self._config.data.seq_len

    def epochs(self, step: int) -> float:
        return step * self._config.train.global_batch_size / len(self._ids["train"])

    def skip(self, steps: int) -> None:
        self.skipped += steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps_taken": self._taken, "skipped": self.skipped, "sequences": self._digest}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved.get("sequences") != self._digest:
            raise UserError(f"finetune.table={self._section.table} does not hold the sequences, labels and splits that "
                            "the run has learnt so far: give those back, or start in another train.run_dir")
        self._taken, self.skipped = saved["steps_taken"], saved["skipped"]

    def close(self) -> None:
        """Nothing reads ahead."""


class _Batches:
    """The batches of a split, of one strand and then of the other where both are asked for."""

    def __init__(self, task: Finetuning, split: str, strands: Sequence[bool]) -> None:
        self._task, self._split, self._strands = task, split, strands

    def __len__(self) -> int:
        return self._task.batch_count(self._split) * len(self._strands)

    def __iter__(self) -> Iterator[Rows]:
        for strand in self._strands:
            yield from self._task.batches(self._split, strand)


def _fill(backbone: nn.Module, weights: Mapping[str, Tensor], groups: Groups) -> None:
    """Give a backbone this tensor rank's share of whole weights."""
    table = backbone.placement()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(tensor_share(weights[name], table[name], groups.tensor.rank, groups.tensor.size))


def adapt(backbone: HyenaModel, section: FinetuneSection, *, seed: int) -> None:
    """Leave of a pretrained backbone trainable what `finetune.trained` says, and add to it what that learns instead.

    Raises:
        UserError: the backbone has no room for that.
    """
    if section.trained == "lora":
        targets = [] if section.lora_targets is None else words_of(section.lora_targets)
        add_adapters(backbone, rank=section.lora_rank, alpha=section.lora_alpha, targets=targets, seed=seed)
    elif section.trained == "head":
        backbone.requires_grad_(False)


def _scale_of(targets: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the training labels, by which a regression is learnt."""
    return float(targets.mean()), float(targets.std()) or 1.0
