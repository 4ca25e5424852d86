"""What a build has read, added up: what of it can be scored, what looks odd, and what is held out and also trains."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyena_dist.config.sections.data import DataSection
from hyena_dist.data.contigs import Contig, Source
from hyena_dist.data.copies import Copies, Samples
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import ContigInfo
from hyena_dist.data.measure import CODES, ContigMeasure, Measure, Tally
from hyena_dist.data.sketch import WINDOW
from hyena_dist.data.splits import SPLITS, Splits, Stretch
from hyena_dist.data.twins import Twins
from hyena_dist.data.vcf import Genotypes

MOST_FAMILIAR = 0.3
"""Share of the held-out 32-mers that may also train before it is said. Repeats alone are less in most genomes."""

SHORT = DataSection.seq_len
"""Contigs of at most so many bases do not fill a window of the default length, and it is said how many they are."""


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
    """Counts over contigs, in the order of the files."""

    def __init__(self) -> None:
        self.contigs: list[ContigInfo] = []
        self.splits = {split: Tally() for split in (*SPLITS, "")}
        """What each split holds, and under "" what is in none."""
        self.assemblies: dict[tuple[str, str], Tally] = {}
        """By assembly and species."""
        self.copies: Copies | None = None
        """Known when all was read and checked."""
        self._rna, self._stray_u, self._n_rich, self._masked = _Kind(), _Kind(), _Kind(), _Kind()
        self._single, self._short, self._whole, self._same = _Kind(), _Kind(), _Kind(), _Kind()
        self._twins = Twins()
        self._samples = Samples()
        self._files: dict[str, list[Path]] = {}
        self._genotypes: dict[Source, Genotypes] = {}

    @property
    def whole(self) -> Tally:
        """Of all that was read."""
        return sum(self.splits.values(), Tally())

    @property
    def bases(self) -> dict[str, int]:
        """Bases of each split."""
        return {split: self.splits[split].bases for split in SPLITS}

    def enter(self, read: Contig, stored: Contig, info: ContigInfo) -> None:
        """A contig has been read, as it is in its file, and as shards hold it."""
        self.contigs.append(info)
        if stored.bases is not read.bases:
            self._rna.add(info.name, int(np.count_nonzero(stored.bases != read.bases)))
        if read.origin:
            self._genotypes[read.source] = read.origin.genotypes
        if read.source.label and not read.origin:
            files = self._files.setdefault(info.species, [])
            if not files or read.source.path not in files:
                files.append(read.source.path)

    def add(self, infos: Sequence[ContigInfo], stretches: Sequence[Sequence[Stretch]], measure: Measure) -> None:
        """Contigs have been measured; in the order in which they were read."""
        for info, rows, found in zip(infos, stretches, measure.contigs, strict=True):
            for split, counted in found.tallies.items():
                self.splits[split] += counted
            self._look_at(info, rows, found)
        self._samples.add(*measure[1:])

    def _look_at(self, info: ContigInfo, stretches: Sequence[Stretch], found: ContigMeasure) -> None:
        whole = found.whole
        origin = info.assembly, info.species
        self.assemblies[origin] = self.assemblies.get(origin, Tally()) + whole
        if uracil := whole.codes[CODES.index("U")]:
            self._stray_u.add(info.name, uracil)
        if 2 * whole.unknown > info.bases:
            self._n_rich.add(info.name, info.bases)
        if 2 * whole.lower > info.bases:
            self._masked.add(info.name, info.bases)
        if info.bases < 2:
            self._single.add(info.name, 1)
        elif info.bases <= SHORT:
            self._short.add(info.name, info.bases)
        if not any(stretch.split != "train" for stretch in stretches):
            self._whole.add(info.name, info.bases)
        twin = self._twins.add(info.name, info.bases, found.strands, stretches)
        if twin is not None:
            self._same.add(f"{info.name} and {twin}", info.bases)

    def check(self, splits: Splits, *, allow_copies: float = 0.0) -> None:
        """Refuse what a run could learn or measure nothing with; after the last contig.

        Args:
            allow_copies: share of what is held out that may also train.

        Raises:
            DataError: no base can be scored, or none of a split that was asked for, or what is held out also trains.
        """
        scored = {split: self.splits[split].scored for split in SPLITS}
        if not any(scored.values()):
            raise DataError("no base of these files can be scored: all are N or other codes than A, C, G and T, in no "
                            "split, or the first of their stretch; give sequence that is known")
        for split in SPLITS:
            if split in splits.wanted and not scored[split]:
                longest = max(info.bases for info in self.contigs)
                raise DataError(f"{splits.asked_by}: no base of split {split} can be scored: it has "
                                f"{self.bases[split]:,} bases, of {len(self.contigs):,} contigs of at most {longest:,} "
                                f"each; choose other stretches")
        self.copies = self._samples.copies()
        leak = self._twins.leak()
        held_out = sum(bases for split, bases in self.bases.items() if split != "train")
        if leak.bases > allow_copies * held_out:
            raise DataError(f"{splits.asked_by}: {leak.one!r} and {leak.other!r} are the same sequence, and what is "
                            f"held out of one trains in the other: of {held_out:,} held-out bases {leak.bases:,} train "
                            f"so; leave one out, hold both out whole, or say with --allow-copies what share may")
        across, windows = sum(self.copies.across.values()), self._held_windows()
        if self.copies.first is not None and across > allow_copies * windows:
            held, trained = map(self._position, self.copies.first)
            raise DataError(f"{splits.asked_by}: held-out sequence also trains, on the same strand or the other: "
                            f"{across:,} of {windows:,} sampled windows of {WINDOW} bases ({across / windows:.1%}), "
                            f"the first at {held}, which is at {trained} too; repeats are in every genome, so say with "
                            f"--allow-copies what share may, or hold both out, or leave one out (--exclude)")

    def _held_windows(self) -> int:
        assert self.copies is not None
        return sum(count for split, count in self.copies.windows.items() if split != "train")

    def _position(self, place: int) -> str:
        """A place in the concatenation of all contigs, as people write it."""
        for info in self.contigs:
            if place < info.bases:
                return f"{info.name}:{place + 1:,}"
            place -= info.bases
        raise AssertionError(place)

    def notes(self, splits: Splits) -> list[str]:
        """What the user should know, a line each; after `check`."""
        notes = [
            *splits.notes(),
            *(line for genotypes in self._genotypes.values() for line in genotypes.notes()),
            *self._rna.note("RNA: {contigs} with U and no T, first {first}: {bases} U are stored as T"),
            *self._stray_u.note("U in DNA: {contigs} with T and U, first {first}: {bases} U read as [UNK] and are not "
                                "scored"),
            *self._n_rich.note("more than half N: {contigs}, first {first}, {bases} bases"),
            *self._masked.note("more than half lower case (soft-masked): {contigs}, first {first}, {bases} bases; read "
                               "as upper case"),
            *self._single.note("a single base: {contigs}, first {first}: without a next base there is no window"),
            *self._short.note(f"at most {SHORT:,} bases: {{contigs}}, first {{first}}, {{bases}} bases; where windows "
                              f"are longer, data.pack=true lets them share some"),
            *self._same.note("the same sequence twice: {contigs}, first {first}, {bases} bases"),
        ]
        leaked = self._twins.leak().bases
        if leaked:
            notes.append(f"{leaked:,} held-out bases also train, under another name")
        if self.copies is not None and (across := sum(self.copies.across.values())):
            notes.append(f"{across:,} of {self._held_windows():,} held-out windows of {WINDOW} bases, sampled, also "
                         f"train")
        shared = self._samples.shared()
        if shared.trained > MOST_FAMILIAR * shared.held_out and not leaked:
            notes.append(f"{shared.trained / shared.held_out:.0%} of what is held out, by 32-mers, also trains: "
                         f"copies, or assemblies of one species; validation is of sequence that was seen")
        if splits.of_each_contig:
            notes += self._whole.note("nothing held out: {contigs}, first {first}, {bases} bases")
        for species, files in self._files.items():
            if len(files) > 1:
                notes.append(f"species {species!r} comes from {len(files)} files, the first are {files[0]} and "
                             f"{files[1]}: were they assemblies of one genome, what is held out of one would train in "
                             f"the other")
        if not self.splits["train"].scored:
            notes.append("no base trains")
        return notes
