"""The convolutional network on a fine-tuning's task: the same sequences, order, steps, validation and judgement."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hyena_dist.data.labelled import encoded
from hyena_dist.data.tokenizer import NUCLEOTIDES, PAD, TOKENS
from hyena_dist.model.cnn import SHORTEST, ConvolutionalModel
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.answers import Drawn
from hyena_dist.train.finetuning import Finetuning


class Convolutional(Finetuning):
    """Every rank reads whole sequences of single bases, whatever the backbone beside it reads; context and tensor ranks
    do the same work, which is small."""

    def _build(self, weights: Mapping[str, Tensor] | None) -> ConvolutionalModel:
        assert weights is None, "it starts from nothing"
        return ConvolutionalModel(vocabulary=len(TOKENS), padding=PAD, length=self._longest(),
                                  outputs=self._labelled.outputs, seed=self._config.train.seed)

    def _tokens(self, split: str, drawn: Drawn) -> np.ndarray:
        return encoded(self._labelled.splits[split][drawn.number], NUCLEOTIDES, reverse=drawn.reverse)

    def _slices(self) -> Axis:
        return Axis()

    def _width(self, rows: Sequence[np.ndarray]) -> int:  # noqa: ARG002 - every batch is as wide
        return self._longest()

    def _longest(self) -> int:
        return max(SHORTEST, *(example.length for examples in self._labelled.splits.values()
                               for example in examples))
