"""Which bases train, validate and test: a BED, whole contigs, or a fraction of every contig.

Every base belongs to at most one split, windows never cross a split's border, and so validation shares no base with
training.
"""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from hyena_dist.data.bed import Bed, Row, merged, overlap, without
from hyena_dist.data.errors import DataError

SPLITS = ("train", "val", "test")
_ALIASES = {"valid": "val", "validation": "val"}


class Stretch(NamedTuple):
    """Bases [start, end) of a contig, all of one split."""

    start: int
    end: int
    split: str


class Splits:
    """Every base trains; the other ways to split derive from this."""

    asked_by = ""
    """What the user wrote, for messages."""
    wanted: Collection[str] = ()
    """Splits that must have bases to score."""
    of_each_contig = False
    """Whether a part of each contig is held out."""

    def stretches(self, contig: str, bases: int) -> list[Stretch]:  # noqa: ARG002
        """The stretches of a contig in order, without overlap; bases outside them are not used."""
        return [Stretch(0, bases, "train")]

    def check_contigs(self, known: Collection[str]) -> None:
        """Refuse names that no file of sequence has."""

    def notes(self) -> list[str]:
        """What the user should know of how the bases were chosen, a line each."""
        return []


class ContigSplits(Splits):
    """These contigs validate, every other trains.

    Args:
        lists: names, or names joined by commas. One that is as a whole the name of a contig is that contig, comma and
            all; it is then refused where its parts are contigs, too.
    """

    def __init__(self, lists: Collection[str]):
        self._parts = {text: [name for name in text.split(",") if name] for text in lists}
        self.held_out = {*self._parts, *(name for parts in self._parts.values() for name in parts)}
        if not any(self._parts.values()):
            raise DataError("--val-contigs: no name is given; write them as in chr14,chrX, or leave the option out")
        self.asked_by, self.wanted = "--val-contigs", ("val",)

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        return [Stretch(0, bases, "val" if contig in self.held_out else "train")]

    def check_contigs(self, known: Collection[str]) -> None:
        for text, parts in self._parts.items():
            whole = text in known and parts != [text]
            for contig in parts:
                if whole and contig in known:
                    raise DataError(f"--val-contigs: {text!r} is a contig, and so is {contig!r}; rename one of them")
                if not whole and contig not in known:
                    raise DataError(f"--val-contigs: {contig!r} is in none of the files; check the name (chr1 or 1?), "
                                    "and give a name with a comma in it an option --val-contigs of its own")


class FractionSplits(Splits):
    """One stretch of each contig validates: that share of its bases, at a place that only the contig's name decides."""

    of_each_contig = True

    def __init__(self, fraction: float):
        if not 0 < fraction < 1:
            raise DataError(f"--val-fraction must be greater than 0 and less than 1, got {fraction}")
        self.fraction = fraction
        self.asked_by, self.wanted = f"--val-fraction {fraction:g}", ("train", "val")

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        held_out = round(bases * self.fraction)
        draw = int.from_bytes(hashlib.sha256(contig.encode()).digest()[:8], "little")
        start = draw % (bases - held_out + 1)
        end = start + held_out
        found = (Stretch(0, start, "train"), Stretch(start, end, "val"), Stretch(end, bases, "train"))
        return [stretch for stretch in found if stretch.start < stretch.end]


class BedSplits(Splits):
    """The rows of a BED: contig, start, end and, as the fourth column, train, val (or valid) or test.

    Adjacent and overlapping rows of one split are merged; bases in no row are not used. Two rows of different splits
    that overlap are refused, and so are rows outside their contig, unless they are to be cut.
    """

    def __init__(self, path: Path, *, cut: bool = False):
        self.bed = Bed(path, cut=cut, least=4, columns="contig, start, end, split")
        self.asked_by = str(path)
        self._asked = {row.split for contig, rows in self.bed.rows.items() for row in self._merge(contig, rows)}
        self._left: set[str] = set()
        """Splits of which a row is inside a contig."""
        self.wanted = self._asked

    def _split_of(self, row: Row) -> str:
        split = _ALIASES.get(row.name.lower(), row.name.lower())
        if split not in SPLITS:
            raise DataError(f"{self.bed.path}: line {row.line}: split {row.name!r} is not one of {', '.join(SPLITS)}")
        return split

    def _merge(self, contig: str, rows: list[Row]) -> list[Stretch]:
        found: list[Stretch] = []
        last_line = 0
        for row in sorted(rows):
            split = self._split_of(row)
            if found and row.start < found[-1].end and split != found[-1].split:
                raise DataError(f"{self.bed.path}: line {row.line}: {contig}:{row.start}-{row.end} ({split}) overlaps "
                                f"line {last_line} ({found[-1].split}); splits may not share bases, cut one of the "
                                f"rows")
            if found and row.start <= found[-1].end and split == found[-1].split:
                found[-1] = found[-1]._replace(end=max(found[-1].end, row.end))
            else:
                found.append(Stretch(row.start, row.end, split))
            last_line = row.line
        return found

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        found = self._merge(contig, self.bed.of(contig, bases))
        self._left |= {row.split for row in found}
        return found

    def check_contigs(self, known: Collection[str]) -> None:
        self.bed.check_contigs(known)
        if self.bed.cut:  # who asks for it knows that rows are lost, and a whole split may be
            self.wanted = self._left

    def notes(self) -> list[str]:
        lost = ", ".join(split for split in SPLITS if split in self._asked - self._left)
        return [*self.bed.note(), *([f"{self.bed.path}: no row of {lost} is inside a contig"] if lost else [])]


class Within(Splits):
    """What other splits choose, but only inside the rows of some BED files and outside those of others.

    Args:
        splits: what is chosen from.
        include: a base must be in a row of each of these.
        exclude: and in none of these.
    """

    def __init__(self, splits: Splits, include: Sequence[Bed], exclude: Sequence[Bed]):
        self._splits, self._include, self._exclude = splits, include, exclude
        self.asked_by = ", ".join([*filter(None, [splits.asked_by]), *(f"--include {bed.path}" for bed in include),
                                   *(f"--exclude {bed.path}" for bed in exclude)])
        self.of_each_contig = splits.of_each_contig
        self._left_out: dict[str, int] = {}

    @property
    def wanted(self) -> Collection[str]:  # type: ignore[override]
        return self._splits.wanted

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        chosen = kept = self._splits.stretches(contig, bases)
        for beds, part in ((self._include, overlap), (self._exclude, without)):
            for bed in beds:
                spans = merged((row.start, row.end) for row in bed.of(contig, bases))
                kept = [Stretch(*span, row.split) for row in kept for span in part(row.start, row.end, spans)]
        self._left_out[contig] = _bases(chosen) - _bases(kept)
        return kept

    def check_contigs(self, known: Collection[str]) -> None:
        self._splits.check_contigs(known)
        for bed in (*self._include, *self._exclude):
            bed.check_contigs(known)

    def notes(self) -> list[str]:
        return [*self._splits.notes(), *(line for bed in (*self._include, *self._exclude) for line in bed.note()),
                f"--include and --exclude leave out {sum(self._left_out.values()):,} bases"]


def _bases(stretches: Sequence[Stretch]) -> int:
    return sum(row.end - row.start for row in stretches)
