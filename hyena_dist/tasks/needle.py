"""Needle tables, made by seed: what a model with a long context has to find and a model without one cannot.

Every sequence is random bases with one of two motifs in it, which decides its label, and lies far back: the last of
`slices` equal parts of the sequence never holds it. Distractors, as many of either motif, differ from it in a few bases
and may lie anywhere; neither motif occurs by chance. The head of a model that reads the last base only
(finetune.pooling=last) has the answer only if its context reaches from there to the motif.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyena_dist.config.whole import new_directory
from hyena_dist.data.errors import DataError
from hyena_dist.tasks.needle_size import NeedleSize

LETTERS = np.frombuffer(b"ACGT", np.uint8)


class Needle(NeedleSize):
    """The sequences of a kind of table."""

    def motifs(self) -> np.ndarray:
        """[2, motif], of label 0 and of label 1, numbers of bases."""
        return np.random.default_rng([self.seed, 0x6E65]).integers(0, 4, (2, self.motif))

    def sequence(self, label: int, part: int, rng: np.random.Generator, *, copies: int = 1) -> tuple[str, int]:
        """A sequence whose first motif begins in a part, from 0, and where that is."""
        motifs, size = self.motifs(), self.motif
        bases = rng.integers(0, 4, self.length)
        width = self.length // self.slices
        place = int(rng.integers(part * width, (part + 1) * width - size + 1))
        taken = np.zeros(self.length, dtype=bool)
        taken[place : place + size] = True
        for number in range(2 * self.distractors):
            start = self._free(taken, self.length, rng)
            near = motifs[number % 2].copy()
            changed = rng.permutation(size)[: self.mismatches]
            near[changed] = (near[changed] + rng.integers(1, 4, self.mismatches)) % 4
            bases[start : start + size] = near
        self._remove(bases, rng)
        places = [place] + [self._free(taken, width * (self.slices - 1), rng) for _ in range(copies - 1)]
        for start in places:
            bases[start : start + size] = motifs[label]
        # Where the motif meets its neighbours it may occur a second time, or the other one may.
        if len(self._found(bases)) != copies:
            return self.sequence(label, part, rng, copies=copies)
        return LETTERS[bases].tobytes().decode(), place

    def _free(self, taken: np.ndarray, end: int, rng: np.random.Generator) -> int:
        """A place of a motif's length before `end` that nothing has yet; it is taken."""
        while True:
            start = int(rng.integers(0, end - self.motif + 1))
            if not taken[start : start + self.motif].any():
                taken[start : start + self.motif] = True
                return start

    def _found(self, bases: np.ndarray) -> np.ndarray:
        """Where a motif begins."""
        windows = np.lib.stride_tricks.sliding_window_view(bases, self.motif)
        return np.flatnonzero((windows[:, None] == self.motifs()).all(2).any(1))

    def _remove(self, bases: np.ndarray, rng: np.random.Generator) -> None:
        """Motifs that came about by chance."""
        while (found := self._found(bases)).size:
            for start in found:
                bases[start + rng.integers(self.motif)] = rng.integers(4)


def write_needle(dest: Path, needle: Needle, *, train: int, valid: int, test: int) -> None:
    """A directory with train.csv, dev.csv and test.csv for `finetune.table`. Labels, and the slices in which the motif
    lies, are balanced; the name of a sequence says the slice and the place, as `slice-0-at-1234`.

    Raises:
        UserError: the directory exists.
        OSError: it cannot be written.
    """
    with new_directory(dest) as aside:
        for number, (name, count) in enumerate({"train": train, "dev": valid, "test": test}.items()):
            rng = np.random.default_rng([needle.seed, needle.length, number])
            most = needle.copies if name == "train" else 1
            with (aside / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["name", "sequence", "label"])
                for row in range(count):
                    copies = int(2 ** (rng.random() * np.log2(most))) if most > 1 else 1
                    part, label = row % (needle.slices - 1), row // (needle.slices - 1) % 2
                    bases, place = needle.sequence(label, part, rng, copies=copies)
                    writer.writerow([f"slice-{part}-at-{place}", bases, label])


def accuracy_by_slice(predictions: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Of the lines of a predictions.tsv of such a table: right ones and all of each slice.

    Raises:
        DataError: they are those of something else, or of no sequence.
    """
    found: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(predictions, 1):
        fields = line.split("\t")
        if number == 1:
            if fields[:3] != ["name", "label", "predicted"]:
                raise DataError("line 1: does not begin with the columns name, label and predicted: give the "
                                "predictions.tsv of a fine-tuned classifier")
            continue
        match = re.fullmatch("slice-([0-9]{1,9})-at-[0-9]+", fields[0])
        if match is None or len(fields) < 3:
            raise DataError(f"line {number}: the name {fields[0][:40]!r} says no slice: give the predictions.tsv of a "
                            "model that was fine-tuned on a needle table")
        right, count = found.get(part := int(match[1]), (0, 0))
        found[part] = right + (fields[1] == fields[2]), count + 1
    if not found:
        raise DataError("has no line of a sequence: give the predictions.tsv of a model that was fine-tuned on a "
                        "needle table")
    return found
