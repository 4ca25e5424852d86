"""What a build has read, counted: what of it can be scored, what looks odd, and what is held out and also trains."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyena_dist.data.contigs import Contig
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import ContigInfo
from hyena_dist.data.sketch import Sketch
from hyena_dist.data.splits import SPLITS, Splits, Stretch
from hyena_dist.data.twins import Twins, chunks

WORST_LEAK = 0.1
"""Share of the held-out bases that may also train; beyond it a validation loss is that of bases seen before."""
MOST_FAMILIAR = 0.3
"""Share of the held-out 32-mers that may also train before it is said. Repeats alone are less in most genomes."""
_BASES = b"ACGTacgt"


class _Kind:
    """Contigs of which something is to be said."""

    def __init__(self) -> None:
        self.contigs, self.bases, self.first = 0, 0, ""

    def add(self, name: str, bases: int) -> None:
        self.first = self.first or name
        self.contigs += 1
        self.bases += bases

    def note(self, what: str) -> list[str]:
        """`what` is said of them, with {contigs}, {bases} and {first}; nothing where there are none."""
        if not self.contigs:
            return []
        contigs = f"{self.contigs:,} contig{'s' * (self.contigs > 1)}"
        return [what.format(contigs=contigs, bases=f"{self.bases:,}", first=self.first)]


class Census:
    """Counts over contigs, in the order of the FASTA files."""

    def __init__(self) -> None:
        self.contigs: list[ContigInfo] = []
        self.bases = dict.fromkeys(SPLITS, 0)
        self.scored = dict.fromkeys(SPLITS, 0)
        """Bases of each split that are A, C, G or T and have a base before them in their stretch."""
        self.unknown, self.other, self.lower = 0, 0, 0
        """Bases that are N, that are other codes, and that are in lower case (soft-masked)."""
        self._rna, self._stray_u, self._n_rich, self._masked = _Kind(), _Kind(), _Kind(), _Kind()
        self._single, self._whole, self._same = _Kind(), _Kind(), _Kind()
        self._twins = Twins()
        self._sketch = Sketch()
        self._files: dict[str, list[Path]] = {}

    def add(self, read: Contig, stored: Contig, info: ContigInfo, stretches: Sequence[Stretch], *,
            holds_out: bool) -> None:
        """Count a contig.

        Args:
            read, stored: as in its file, and as shards hold it.
            holds_out: some of all that is read does not train.
        """
        self.contigs.append(info)
        for stretch in stretches if holds_out else ():
            self._sketch.add(stored.bases[stretch.start : stretch.end], held_out=stretch.split != "train")
        unknown, uracil = 0, 0
        for chunk in chunks(stored.bases, 0, info.bases):
            rest = chunk.translate(None, _BASES).upper()
            unknown += rest.count(b"N")
            uracil += rest.count(b"U")
            self.other += len(rest)
        self.unknown += unknown
        self.other -= unknown
        lower = int(np.count_nonzero(stored.bases & 0x20))
        self.lower += lower
        for stretch in stretches:
            self.bases[stretch.split] += stretch.end - stretch.start
            for chunk in chunks(stored.bases, stretch.start + 1, stretch.end):
                self.scored[stretch.split] += len(chunk) - len(chunk.translate(None, _BASES))
        if stored.bases is not read.bases:
            self._rna.add(info.name, int(np.count_nonzero(stored.bases != read.bases)))
        if uracil:
            self._stray_u.add(info.name, uracil)
        if 2 * unknown > info.bases:
            self._n_rich.add(info.name, info.bases)
        if 2 * lower > info.bases:
            self._masked.add(info.name, info.bases)
        if info.bases < 2:
            self._single.add(info.name, 1)
        if not any(stretch.split != "train" for stretch in stretches):
            self._whole.add(info.name, info.bases)
        if read.source.label:
            files = self._files.setdefault(info.species, [])
            if not files or read.source.path not in files:
                files.append(read.source.path)
        self._look_for_twin(stored.bases, info, stretches)

    def _look_for_twin(self, bases: np.ndarray, info: ContigInfo, stretches: Sequence[Stretch]) -> None:
        twin = self._twins.add(info.name, bases, stretches)
        if twin is not None:
            self._same.add(f"{info.name} and {twin}", info.bases)

    def check(self, splits: Splits) -> None:
        """Refuse what a run could learn or measure nothing with.

        Raises:
            DataError: no base can be scored, or none of a split that was asked for, or what is held out also trains.
        """
        if not any(self.scored.values()):
            raise DataError("no base of these files can be scored: all are N or other codes than A, C, G and T, in no "
                            "split, or the first of their stretch; give sequence that is known")
        for split in SPLITS:
            if split in splits.wanted and not self.scored[split]:
                longest = max(info.bases for info in self.contigs)
                raise DataError(f"{splits.asked_by}: no base of split {split} can be scored: it has "
                                f"{self.bases[split]:,} bases, of {len(self.contigs):,} contigs of at most {longest:,} "
                                f"each; choose other stretches")
        held_out = sum(bases for split, bases in self.bases.items() if split != "train")
        leak = self._twins.leak()
        if leak.bases > WORST_LEAK * held_out:
            raise DataError(f"{splits.asked_by}: {leak.one!r} and {leak.other!r} are the same sequence, and what is "
                            f"held out of one trains in the other: of {held_out:,} held-out bases {leak.bases:,} train "
                            f"so; leave one out, or hold both out whole")

    def notes(self, splits: Splits) -> list[str]:
        """What the user should know, a line each."""
        notes = [
            *splits.notes(),
            *self._rna.note("RNA: {contigs} with U and no T, first {first}: {bases} U are stored as T"),
            *self._stray_u.note("U in DNA: {contigs} with T and U, first {first}: {bases} U read as [UNK] and are not "
                                "scored"),
            *self._n_rich.note("more than half N: {contigs}, first {first}, {bases} bases"),
            *self._masked.note("more than half lower case (soft-masked): {contigs}, first {first}, {bases} bases; read "
                               "as upper case"),
            *self._single.note("a single base: {contigs}, first {first}: without a next base there is no window"),
            *self._same.note("the same sequence twice: {contigs}, first {first}, {bases} bases"),
        ]
        leaked = self._twins.leak().bases
        if leaked:
            notes.append(f"{leaked:,} held-out bases also train, under another name")
        held_out, trained = self._sketch.shared()
        if trained > MOST_FAMILIAR * held_out and not leaked:
            notes.append(f"{trained / held_out:.0%} of what is held out, by 32-mers, also trains: copies, or "
                         f"assemblies of one species; validation is of sequence that was seen")
        if splits.of_each_contig:
            notes += self._whole.note("nothing held out: {contigs}, first {first}, {bases} bases")
        for species, files in self._files.items():
            if len(files) > 1:
                notes.append(f"species {species!r} comes from {len(files)} files, the first are {files[0]} and "
                             f"{files[1]}: were they assemblies of one genome, what is held out of one would train in "
                             f"the other")
        if not self.scored["train"]:
            notes.append("no base trains")
        return notes
