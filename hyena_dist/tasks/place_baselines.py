"""What stands beside the result of a fine-tuning whose labels belong to places: regressions that see the bases around a
place alone, and what can be said without looking at any base.

A bin is seen as the counts of k-mers in it and in its two neighbours, a bin of fewer than 16 bases, and a base, as the
bases up to so far to either side, and a pair of bins as the sums and the products of their counts, beside the mean of
all training pairs that are as far apart.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyena_dist.data.labelled import Labelled
from hyena_dist.data.tables import reverse_complement
from hyena_dist.data.tokenizer import IGNORE
from hyena_dist.tasks.baselines import STRENGTHS
from hyena_dist.train.answers import Tally
from hyena_dist.train.place_tallies import ClassTally, bin_tally, pair_tally

LENGTHS, REACHES, SHORT = (2, 3, 4), (4, 8, 16), 16
"""The k of k-mers and, for bins of fewer bases than SHORT, how many bases to either side, that are tried."""
SAMPLED, CHUNK = 20_000, 4096
"""Training places that a regression learns from, drawn from sequences that are evenly spread, and about as many of
valid that it is chosen by; places that are answered at once."""
CHOOSES = {"per_base": "mcc", "binned": "pearson", "pairs": "pearson"}

_CODES = np.full(256, 4, dtype=np.int64)
_CODES[np.frombuffer(b"ACGTacgt", dtype=np.uint8)] = [0, 1, 2, 3] * 2


class Sequence:
    """One sequence's places, in the order of its labels' rows: bases, bins, or pairs i <= j of bins."""

    def __init__(self, labelled: Labelled, split: str, number: int, both_strands: bool) -> None:
        assert labelled.places is not None
        example = labelled.splits[split][number]
        self._size, self._pairs, self._both = labelled.places.bin_size, labelled.task == "pairs", both_strands
        self._strands = [_CODES[np.frombuffer(bases, dtype=np.uint8)]
                         for bases in (example.bases, reverse_complement(example.bases))]
        self._counted: dict[int, np.ndarray] = {}
        labels = labelled.at_places(split, number)
        self.bins = len(labels)
        self.first, self.second = np.triu_indices(self.bins) if self._pairs else (np.arange(self.bins),) * 2
        self.labels = labels[self.first, self.second, None] if self._pairs else labels.reshape(self.bins, -1)
        """[places, outputs]; of bases, their classes."""

    @property
    def known(self) -> np.ndarray:
        """Places that have a label."""
        there = self.labels != IGNORE if self.labels.dtype.kind == "i" else ~np.isnan(self.labels)
        return there.any(1).nonzero()[0]

    def seen(self, places: np.ndarray, k: int) -> np.ndarray:
        """[n, features] of these places."""
        if self._pairs:
            one, other = (self._counts(k)[side[places]] for side in (self.first, self.second))
            return np.concatenate([one + other, one * other], 1)
        if self._size < SHORT:
            return self._bases(places, k)
        padded = np.pad(self._counts(k), ((1, 1), (0, 0)))
        return np.concatenate([padded[places + shift] for shift in (1, 0, 2)], 1)

    def _bases(self, places: np.ndarray, reach: int) -> np.ndarray:
        around = np.arange(-reach, self._size + reach)
        padded = np.pad(self._strands[0], reach, constant_values=4)
        return np.eye(5)[padded[places[:, None] * self._size + around + reach], :4].reshape(len(places), -1)

    def _counts(self, k: int) -> np.ndarray:
        """[bins, 4**k], the share of each k-mer among those of a bin; of both strands where both are seen."""
        if k not in self._counted:
            found = self._count(self._strands[0], k)
            self._counted[k] = (found + self._count(self._strands[1], k)[::-1]) / 2 if self._both else found
        return self._counted[k]

    def _count(self, codes: np.ndarray, k: int) -> np.ndarray:
        if k > self._size:
            return np.zeros((self.bins, 4**k))
        rows = codes[: self.bins * self._size].reshape(self.bins, self._size)
        windows = np.lib.stride_tricks.sliding_window_view(rows, k, axis=1)
        words, whole = windows @ 4 ** np.arange(k), (windows < 4).all(2)
        cells = (np.arange(self.bins)[:, None] * 4**k + words)[whole]
        found = np.bincount(cells, minlength=self.bins * 4**k).reshape(self.bins, 4**k)
        return found / (self._size - k + 1)


class Trivial:
    """Answers without a look at the bases: the shares of the classes, the mean of each track, or the mean of all pairs
    that are as far apart, of the labels of sequences that were added."""

    def __init__(self, labelled: Labelled) -> None:
        assert labelled.places is not None
        longest = max(example.length for examples in labelled.splits.values() for example in examples)
        groups = longest // labelled.places.bin_size if labelled.task == "pairs" else 1
        self._classes, self._outputs, self._scale = labelled.task == "per_base", labelled.outputs, labelled.scale
        self._sums, self._counts = (np.zeros((groups, labelled.outputs)) for _ in range(2))

    def add(self, one: Sequence, known: np.ndarray) -> None:
        values = np.eye(self._outputs)[one.labels[known, 0]] if self._classes else one.labels[known]
        there = ~np.isnan(values)
        np.add.at(self._sums, self._group(one, known), np.where(there, values, 0))
        np.add.at(self._counts, self._group(one, known), there)

    def _group(self, one: Sequence, places: np.ndarray) -> np.ndarray:
        return (one.second - one.first)[places] if len(self._sums) > 1 else np.zeros(len(places), dtype=np.int64)

    @property
    def mean(self) -> np.ndarray:
        """[outputs], of all labels; of a track that the sequences do not know, what other training sequences say."""
        counts = self._counts.sum(0)
        found: np.ndarray = self._sums.sum(0) / counts.clip(min=1)
        return found if self._scale is None else np.where(counts > 0, found, self._scale.mean)

    def answers(self, one: Sequence, places: np.ndarray) -> np.ndarray:
        """[n, outputs]."""
        means = np.where(self._counts > 0, self._sums / self._counts.clip(min=1), self.mean)
        found: np.ndarray = means[self._group(one, places)]
        return found


class Regression:
    """A ridge on what differs from the trivial answer, or for classes a logistic regression.

    Args:
        seen: [n, features] of training places, by `Sequence.seen` at this k.
        labels: [n, outputs] of them; of numbers less the trivial answer.
    """

    def __init__(self, labelled: Labelled, trivial: Trivial, k: int, strength: float, seen: np.ndarray,
                 labels: np.ndarray) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._trivial, self._k, self._outputs = trivial, k, labelled.outputs
        self._classes = labelled.task == "per_base"
        if self._classes:
            several = len(np.unique(labels)) > 1
            model = LogisticRegression(C=strength, max_iter=200) if several else DummyClassifier()
            self._model = make_pipeline(StandardScaler(), model).fit(seen, labels[:, 0])
        else:  # a track that is not known counts as its mean
            model = make_pipeline(StandardScaler(), Ridge(alpha=1 / strength))
            self._model = model.fit(seen, np.nan_to_num(labels, nan=0.0))

    def answers(self, one: Sequence, places: np.ndarray) -> np.ndarray:
        """[n, outputs]."""
        seen = one.seen(places, self._k)
        if not self._classes:
            rest = self._model.predict(seen).reshape(len(places), -1)
            return self._trivial.answers(one, places) + rest
        found = np.full((len(places), self._outputs), -np.inf)
        found[:, self._model.classes_] = self._model.predict_log_proba(seen)
        return found


class _AsTheyAre:
    """Answers in the units of the labels."""

    def losses(self, answers: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(targets, dtype=answers.dtype)

    def in_units(self, answers: Tensor) -> Tensor:
        return answers


def place_baselines(labelled: Labelled, *, both_strands: bool, seed: int) -> dict[str, dict[str, Any]]:
    """What two models say that have seen no more than a place's own bases, and not even those: `kmers`, whose k (or
    reach) and regularisation are chosen on valid alone, and `mean`. Test is scored once, with the choice.

    Args:
        both_strands: whether k-mers of the other strand count, too, as for a model that sees both.
        seed: of the training places that are drawn.
    """
    from sklearn.exceptions import ConvergenceWarning

    count = len(labelled.splits["train"])
    numbers = range(0, count, -(-count // 1000))
    trivial, rng = Trivial(labelled), np.random.default_rng(seed)
    drawn: list[tuple[int, np.ndarray]] = []  # a sequence with its counts is large, and is not kept
    for number in numbers:
        one = Sequence(labelled, "train", number, both_strands)
        trivial.add(one, one.known)
        drawn.append((number, rng.permutation(one.known)[: -(-SAMPLED // len(numbers))]))
    in_bins = labelled.task == "pairs" or labelled.places.bin_size >= SHORT  # type: ignore[union-attr]
    enough = -(-SAMPLED // len(Sequence(labelled, "valid", 0, both_strands).labels))
    best: tuple[float, Regression, dict[str, Any]] | None = None
    for k in LENGTHS if in_bins else REACHES:
        seen, labels = _learnt(labelled, drawn, trivial, k, both_strands)
        for strength in STRENGTHS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = Regression(labelled, trivial, k, strength, seen, labels)
            value = _scores(labelled, "valid", model, trivial, both_strands, enough)[CHOOSES[labelled.task]]
            value = -np.inf if value is None else value
            if best is None or value > best[0]:
                chosen = {"k" if in_bins else "reach": k, "strength": strength, "chosen_by": CHOOSES[labelled.task]}
                best = value, model, chosen
    assert best is not None
    splits = [split for split in ("valid", "test") if split in labelled.splits]
    return {name: {**chosen, "scores": {split: _scores(labelled, split, model, trivial, both_strands)
                                        for split in splits}}
            for name, model, chosen in (("kmers", best[1], best[2]), ("mean", trivial, {}))}


def _learnt(labelled: Labelled, drawn: list[tuple[int, np.ndarray]], trivial: Trivial, k: int, both_strands: bool
            ) -> tuple[np.ndarray, np.ndarray]:
    """What `Regression` learns from."""
    found = []
    for number, places in drawn:
        one = Sequence(labelled, "train", number, both_strands)
        rest = 0 if labelled.task == "per_base" else trivial.answers(one, places)
        found.append((one.seen(places, k), one.labels[places] - rest))
    seen, labels = zip(*found, strict=True)
    return np.concatenate(seen), np.concatenate(labels)


def _scores(labelled: Labelled, split: str, model: Trivial | Regression, trivial: Trivial, both_strands: bool,
            most: int | None = None) -> dict[str, float | None]:
    """Of a whole split, or of so many of its sequences."""
    tally: Tally
    if labelled.task == "per_base":
        tally = ClassTally(labelled, split, _AsTheyAre().losses)
    else:
        make = pair_tally if labelled.task == "pairs" else bin_tally
        tally = make(labelled, split, _AsTheyAre(), torch.from_numpy(trivial.mean))
    count = len(labelled.splits[split])
    for number in range(0, count, -(-count // (most or count))):
        answers = _whole(Sequence(labelled, split, number, both_strands), model)
        tally.add([number], torch.from_numpy(answers)[None])
    return tally.scores()


def _whole(one: Sequence, model: Trivial | Regression) -> np.ndarray:
    """The answers to all places of a sequence, as `Answers.whole` gives them."""
    count = len(one.labels)
    answers = np.concatenate([model.answers(one, np.arange(first, min(first + CHUNK, count)))
                              for first in range(0, count, CHUNK)])
    if one.first is one.second:
        return answers
    found = np.zeros((one.bins, one.bins))
    found[one.first, one.second] = answers[:, 0]
    return found
