"""Labels as tokens: a sequence is shown behind a soft prompt, or behind labelled examples, as

    [prompt] x1 SEP y1 SEP x2 SEP y2 SEP ... x SEP

and the class is the token that the language model says next (HyenaDNA, section 4.3; few-shot instruction tuning where
its weights are trained). The loss is of that token among those of the classes.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.labelled import Labelled, encoded
from hyena_dist.data.partition import copy_key
from hyena_dist.data.tokenizer import PAD, TOKENS, A, C, G, N, T
from hyena_dist.model.label_tokens import LabelTokenModel
from hyena_dist.train.answers import Drawn
from hyena_dist.train.finetuning import Finetuning

SEP = TOKENS.index("[SEP]")
FEW = {2: (A, N), 3: (A, G, N)}
"""The tokens of two and of three classes are the published ones."""
MANY = (A, C, G, T, N, *(TOKENS.index(name) for name in ("[CLS]", "[BOS]", "[MASK]", "[RESERVED]", "[UNK]")))
"""Of more: all tokens but SEP, which ends a sequence, and PAD, which stands behind it."""


def class_tokens(classes: int) -> tuple[int, ...]:
    """The token of each class, from 2 to 10 of them."""
    return FEW.get(classes, MANY[:classes])


def check_prompting(config: Config, labelled: Labelled) -> None:
    """Refuse a task or a model whose answers cannot be tokens.

    Raises:
        UserError: naming key and remedy.
    """
    section, classes = config.finetune, len(labelled.classes)
    if config.model.kmer != 1:
        raise UserError(f"the tokens of this model are {config.model.kmer}-mers (model.kmer), and labels are written "
                        "as tokens of single bases: give a model of model.kmer=1")
    if not 2 <= classes <= len(MANY):
        raise UserError(f"finetune.table has {classes} classes, and labels that are tokens are of 2 to {len(MANY)}: "
                        "take finetune.trained=lora or all without finetune.shots")
    counts = {name: sum(example.label == name for example in labelled.splits["train"]) for name in labelled.classes}
    rarest = min(counts, key=counts.__getitem__)
    if (shots := section.shots or 0) and shots >= counts[rarest]:
        raise UserError(f"finetune.shots={shots} asks for {shots} examples of each class beside the sequence itself, "
                        f"and training has {counts[rarest]} of {rarest!r}: lower it")
    rows = row_tokens(section, labelled)
    if rows > config.model.max_seq_len:
        raise UserError(f"{shots} examples of each of {classes} classes (finetune.shots) and a prompt of "
                        f"{_prompt(section)} vectors (finetune.prompt_tokens) make rows of up to {rows:,} tokens, and "
                        f"the model takes {config.model.max_seq_len:,} (model.max_seq_len): lower them, or shorten the "
                        "sequences")


def row_tokens(section: FinetuneSection, labelled: Labelled) -> int:
    """Tokens of the longest row that can come."""
    longest = {split: max((example.length for example in examples), default=0)
               for split, examples in labelled.splits.items()}
    shown = (section.shots or 0) * len(labelled.classes)
    return _prompt(section) + shown * (longest["train"] + 3) + max(longest.values()) + 1


class Prompting(Finetuning):
    """The objective of `finetune.trained=prompt` and of `finetune.shots`."""

    def _build(self, weights: Mapping[str, Tensor] | None) -> LabelTokenModel:
        check_prompting(self._config, self._labelled)
        train = self._labelled.splits["train"]
        self._of_class = [np.array([number for number, example in enumerate(train) if example.label == name])
                          for name in self._labelled.classes]
        self._class_tokens = class_tokens(len(self._labelled.classes))
        return LabelTokenModel(self._backbone(weights), self._class_tokens)

    def _tokens(self, split: str, drawn: Drawn) -> np.ndarray:
        train, pieces = self._labelled.splits["train"], [np.full(_prompt(self._section), PAD)]
        for number, token in self._shots(split, drawn):
            shown = encoded(train[number], self._tokenizer, reverse=drawn.reverse)
            pieces += [shown, np.array([SEP, token, SEP])]
        asked = encoded(self._labelled.splits[split][drawn.number], self._tokenizer, reverse=drawn.reverse)
        return np.concatenate([*pieces, asked, np.array([SEP])]).astype(np.int64)

    def _shots(self, split: str, drawn: Drawn) -> list[tuple[int, int]]:
        """The training sequences that are shown before one, and the tokens of their classes: a function of the seed,
        the sequence and the epoch, the same on every rank and after a resume. The sequence itself is never among
        them."""
        shots = self._section.shots or 0
        rng = np.random.default_rng([self._config.train.seed, 0x73686F74, drawn.number, drawn.epoch + 1,
                                     ("train", "valid", "test").index(split)])
        same = copy_key(both_strands=self._section.rc != "none")
        key = same(self._labelled.splits[split][drawn.number])
        train, found = self._labelled.splits["train"], []
        for numbers, token in zip(self._of_class, self._class_tokens, strict=True):
            others = [number for number in rng.permutation(numbers)[: shots + _COPIES] if same(train[number]) != key]
            found += [(int(number), token) for number in others[:shots]]
        return [found[place] for place in rng.permutation(len(found))]


_COPIES = 16
"""As many copies of a sequence are passed over among those that are drawn to be shown before it."""


def _prompt(section: FinetuneSection) -> int:
    return section.prompt_tokens if section.trained == "prompt" else 0
