"""Fine-tuning, the second objective: the label of every sequence of a table, from a pretrained backbone."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyena_dist.checkpoint.metadata import FINETUNING
from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection, words_of
from hyena_dist.data.labelled import Labelled, encoded
from hyena_dist.data.tokenizer import PAD, tokenizer_of
from hyena_dist.engine.protocol import Table
from hyena_dist.model.cnn import ConvolutionalModel
from hyena_dist.model.depth import scaled_by_depth
from hyena_dist.model.headed import HeadedModel
from hyena_dist.model.lora import add_adapters
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import tensor_share
from hyena_dist.model.prompt import add_prompt
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.parallel.tokens import padded_length, part_of_window
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.answers import Answers, Drawn, Judgement, Tally
from hyena_dist.train.objective import Scores, Step, Watched
from hyena_dist.train.place_answers import answers_of, model_of

logger = logging.getLogger(__name__)

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
    width: int
    """Tokens of a row on all context ranks, with its padding."""
    reverse: bool = False
    """Of a validation, whether they are the other strands of its sequences."""
    targets: Tensor | None = None
    """Of training, as the loss of the answers takes them."""
    scored: float = 0.0
    """How much the loss is the sum of on this context rank."""


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
    has_perplexity = False
    no_batch = "a file with labels does not answer, or the machine stands still: look at both"
    nothing_to_train = "there is no sequence in it"

    def __init__(self, config: Config, groups: Groups, device: torch.device, *, labelled: Labelled,
                 weights: Mapping[str, Tensor] | None) -> None:
        self._config, self._groups, self._device, self._labelled = config, groups, device, labelled
        self._section, self._digest = config.finetune, labelled.digest()
        self.nothing_to_validate = "the model gives no number for the sequences of valid"
        check_same_data(self._digest, groups.world)
        model = self._build(weights)
        self._answers: Answers = answers_of(labelled, self._section, model, groups.context)
        self.extras: Collection[str] = self._answers.metrics
        self.scored_name = self._answers.scored_name
        self._multiple = model.token_multiple
        self.module: nn.Module = model.to(device)
        self.table: Table = scaled_by_depth(model.placement(), config.model.num_layers, self._section.lr_decay)
        self._tokenizer = tokenizer_of(config.model)
        self._taken = self.skipped = 0
        self._epoch = -1
        """That `_order` and `_strands` are of."""
        self._order, self._strands = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)

    def _build(self, weights: Mapping[str, Tensor] | None) -> HeadedModel | ConvolutionalModel:
        """The model that answers."""
        model = model_of(self._labelled, self._section, self._backbone(weights), seed=self._config.train.seed)
        _fill_head(model, weights or {})
        return model

    def _backbone(self, weights: Mapping[str, Tensor] | None) -> HyenaModel:
        """The pretrained model, of which that is trainable which is to be learnt."""
        backbone = build_model(self._config, self._groups)
        if weights is not None:
            _fill(backbone, weights, self._groups)
        adapt(backbone, self._section, seed=self._config.train.seed)
        return backbone

    def _slices(self) -> Axis:
        """The ranks that share the tokens of a row."""
        return self._groups.context

    def _width(self, rows: Sequence[np.ndarray]) -> int:
        """Tokens of the rows of a batch, padding included."""
        return min(padded_length(max(map(len, rows)), _WIDTH), self._config.model.max_seq_len)

    def utilisation(self) -> None:
        """There is no formula for sequences of many lengths."""

    def next_step(self) -> Step[Rows]:
        train, data = self._config.train, self._groups.data
        first = (self._taken + self.skipped) * train.global_batch_size
        share = train.global_batch_size // data.size
        drawn = [self._drawn(first + data.rank * share + i) for i in range(share)]
        self._taken += 1
        micro = train.micro_batch_size
        batches = [self._to_learn(drawn[i : i + micro]) for i in range(0, share, micro)]
        return Step(batches, stage=0, seq_len=self._config.data.seq_len, micro_batch_size=micro,
                    tokens=train.global_batch_size * self._config.data.seq_len)

    def _drawn(self, place: int) -> Drawn:
        """The sequence at a place in the order of training. Each epoch is a permutation of its own, and the next begins
        behind it, in the same batch where that is not full."""
        count = len(self._labelled.splits["train"])
        epoch, index = divmod(place, count)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._config.train.seed, epoch])
            self._order, self._strands = generator.permutation(count), generator.random(count) < 0.5
            self._epoch = epoch
        return Drawn(int(self._order[index]), bool(self._strands[index]) and self._section.rc != "none", epoch)

    def _tokens(self, split: str, drawn: Drawn) -> np.ndarray:
        """What the model reads of a sequence, read now."""
        return encoded(self._labelled.splits[split][drawn.number], self._tokenizer, reverse=drawn.reverse)

    def _to_learn(self, drawn: Sequence[Drawn]) -> Rows:
        rows = self._rows("train", drawn)
        of = ("train", drawn, rows.width)
        return replace(rows, targets=self._answers.targets(*of), scored=self._answers.scored(*of))

    def _rows(self, split: str, drawn: Sequence[Drawn], fill: int = 0) -> Rows:
        """The rows of these sequences, and `fill` rows of no sequence behind them."""
        rows = [self._tokens(split, one) for one in drawn]
        rows += [np.full(1, PAD)] * fill
        first, tokens, padded = part_of_window(self._width(rows), self._slices(), multiple=self._multiple)
        ids = np.full((len(rows), tokens), PAD, dtype=np.int64)
        for row, sequence in zip(ids, rows, strict=True):
            part = sequence[first : first + tokens]
            row[: len(part)] = part
        numbers = [one.number for one in drawn] + [-1] * fill
        return Rows(torch.tensor(numbers), torch.from_numpy(ids), torch.tensor([len(row) for row in rows]), padded)

    def loss(self, module: nn.Module, batch: Rows, step: int) -> Tensor:
        assert batch.targets is not None
        key = DropoutKey(self._config.train.seed, step, batch.numbers.to(self._device))
        answers = module(batch.ids.to(self._device), batch.lengths.to(self._device), key)
        return self._answers.loss(answers, batch.targets.to(self._device))

    def validate(self, module: nn.Module, watched: Watched[Rows]) -> Scores | None:
        tally = self._tallied(module, "valid", watched)
        loss, scored = tally.loss()
        extras = {name: value for name, value in tally.scores().items() if value is not None}
        return Scores(loss, scored, self._config.data.seq_len, extras)

    def predict(self, module: nn.Module, split: str, watched: Watched[Rows]) -> Judgement:
        """What the model says of every sequence of a split; the same on every rank. Collective."""
        return self._tallied(module, split, watched).judgement()

    @torch.no_grad()
    def _tallied(self, module: nn.Module, split: str, watched: Watched[Rows]) -> Tally:
        """The answers to a split, to as many batches of it as are watched."""
        tally = self._answers.tally(split)
        for numbers, answers in self._answered(module, watched(_Batches(self, split, self._strands_asked))):
            tally.add(numbers, answers)
        tally.reduce(self._groups.data)
        return tally

    @torch.no_grad()
    def answer(self, module: nn.Module, split: str, numbers: range) -> Iterator[tuple[int, np.ndarray]]:
        """What the model says of these sequences of a split, one after the other, as `Answers.said` gives it. Numbers
        and answers are those of this data rank's batches. Collective over the ranks that share a sequence."""
        examples = self._labelled.splits[split]
        for found, answers in self._answered(module, self.batches(split, self._strands_asked, numbers)):
            for number, row in zip(found, answers, strict=True):
                yield number, self._answers.said(row, examples[number].length)

    def _answered(self, module: nn.Module, batches: Iterable[Rows]) -> Iterator[tuple[list[int], Tensor]]:
        """The sequences of each batch and the answers to them, means over both strands where asked for."""
        forward = None
        module.eval()
        for rows in batches:
            answers = self._answers.whole(module(rows.ids.to(self._device), rows.lengths.to(self._device)), rows.width)
            if len(self._strands_asked) > 1 and not rows.reverse:
                forward = answers
                continue
            if rows.reverse:
                assert forward is not None
                answers = (forward + self._answers.turned(answers, rows.lengths.tolist())) / 2
            real = int((rows.numbers >= 0).sum())  # rows of no sequence stand behind the others
            yield rows.numbers[:real].tolist(), answers[:real]

    @property
    def _strands_asked(self) -> tuple[bool, ...]:
        """Whether each answer is of the other strand."""
        return (False, True) if self._section.rc == "average" else (False,)

    def batches(self, split: str, strands: Sequence[bool], numbers: range | None = None) -> Iterator[Rows]:
        """This data rank's batches of a split, or of some of its sequences, each of one strand and then of the other;
        as many on every rank, all of the same number of rows."""
        data, micro = self._groups.data, self._config.train.micro_batch_size
        numbers = range(len(self._labelled.splits[split])) if numbers is None else numbers
        for first in range(numbers.start, numbers.stop, micro * data.size):
            start = first + data.rank * micro
            shown = range(start, min(start + micro, numbers.stop))
            for strand in strands:
                rows = self._rows(split, [Drawn(number, strand) for number in shown], fill=micro - len(shown))
                yield replace(rows, reverse=strand)

    def batch_count(self, split: str) -> int:
        """How many `batches` gives."""
        return -(-len(self._labelled.splits[split]) // (self._config.train.micro_batch_size * self._groups.data.size))

    def tokens(self, step: int) -> int:
        return step * self._config.train.global_batch_size * self._config.data.seq_len

    def epochs(self, step: int) -> float:
        return step * self._config.train.global_batch_size / len(self._labelled.splits["train"])

    def skip(self, steps: int) -> None:
        self.skipped += steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps_taken": self._taken, "skipped": self.skipped, "sequences": self._digest,
                "scale": self._answers.scale}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved.get("sequences") != self._digest:
            raise UserError(f"finetune.table={self._section.table} does not hold the sequences, labels and splits that "
                            "the run has learnt so far: give those back, or start in another train.run_dir")
        self._taken, self.skipped = saved["steps_taken"], saved["skipped"]

    def close(self) -> None:
        """Nothing reads ahead."""


class _Batches:
    """The batches of a split."""

    def __init__(self, task: Finetuning, split: str, strands: Sequence[bool]) -> None:
        self._task, self._split, self._strands = task, split, strands

    def __len__(self) -> int:
        return self._task.batch_count(self._split) * len(self._strands)

    def __iter__(self) -> Iterator[Rows]:
        return self._task.batches(self._split, self._strands)


def _fill(backbone: nn.Module, weights: Mapping[str, Tensor], groups: Groups) -> None:
    """Give a backbone this tensor rank's share of whole weights."""
    table = backbone.placement()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(tensor_share(weights[name], table[name], groups.tensor.rank, groups.tensor.size))


def _fill_head(model: HeadedModel, weights: Mapping[str, Tensor]) -> None:
    """Give a head the weights of the one that is started from. They are only there where it answers the same; one that
    has another size, as for another number of tracks, is left out, and that is said."""
    own = {name: parameter for name, parameter in model.named_parameters() if name.startswith("head.")}
    found = {name: weights[f"answers.{name}"] for name in own if f"answers.{name}" in weights}
    if not found:
        return
    if found.keys() != own.keys() or any(own[name].shape != value.shape for name, value in found.items()):
        logger.warning("the head of the model that is started from has another size, and is left out")
        return
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def adapt(backbone: HyenaModel, section: FinetuneSection, *, seed: int) -> None:
    """Leave of a pretrained backbone trainable what `finetune.trained` says, and add to it what that learns instead.

    Raises:
        UserError: the backbone has no room for that.
    """
    if section.trained == "lora":
        targets = [] if section.lora_targets is None else words_of(section.lora_targets)
        add_adapters(backbone, rank=section.lora_rank, alpha=section.lora_alpha, targets=targets, seed=seed)
    elif section.trained == "prompt":
        add_prompt(backbone, section.prompt_tokens, seed=seed)
    elif section.trained != "all":
        backbone.requires_grad_(False)
