"""Which bases train, validate and test: a BED, whole contigs, or a fraction of every contig.

Every base belongs to at most one split, windows never cross a split's border, and so validation shares no base with
training.
"""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from hyena_dist.config.errors import read_remedy
from hyena_dist.config.kinds import START_BYTES, kind_of_text, not_as_it_is
from hyena_dist.config.plain import open_regular
from hyena_dist.data.errors import DataError

SPLITS = ("train", "val", "test")
_BROWSER_WORDS = ("position", "hide", "dense", "pack", "squish", "full")
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
        """Refuse names that no FASTA file has."""


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
                    raise DataError(f"--val-contigs: {contig!r} is in none of the FASTA files; check the name (chr1 or "
                                    "1?), and give a name with a comma in it an option --val-contigs of its own")


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


def _text_lines(path: Path) -> list[str]:
    """Raises DataError: it cannot be read, or is not text of UTF-8."""
    try:
        with open_regular(path) as file:
            content = file.read()
        if kind := kind_of_text(content[:START_BYTES]):
            raise DataError(not_as_it_is(kind, path, "converted.bed"))
        return content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); "
                        f"{read_remedy(error, 'give a BED file as plain text of UTF-8')}") from None


def _is_of_a_browser(fields: list[str]) -> bool:
    """Whether a line tells a genome browser how to show the rows. One that is a row of a contig of that name is not."""
    if fields[0] == "track":
        return len(fields) == 1 or "=" in fields[1]
    return fields[0] == "browser" and (len(fields) == 1 or fields[1] in _BROWSER_WORDS)


class BedSplits(Splits):
    """The rows of a BED: contig, start, end and, as the fourth column, train, val (or valid) or test.

    Adjacent and overlapping rows of one split are merged; bases in no row are not used. A row outside its contig, or
    two rows of different splits that overlap, are refused.
    """

    def __init__(self, path: Path):
        self.path = path
        rows: dict[str, list[tuple[Stretch, int]]] = {}
        for number, line in enumerate(_text_lines(path), 1):
            fields = line.split()
            if fields and not line.startswith("#") and not _is_of_a_browser(fields):
                rows.setdefault(fields[0], []).append((self._parse(fields, number), number))
        if not rows:
            raise DataError(f"{path}: holds no rows; write lines of contig, start, end, split")
        self.asked_by = str(path)
        self.wanted = {row.split for found in rows.values() for row, _ in found}
        self._last_row = {contig: max(found, key=lambda row: row[0].end) for contig, found in rows.items()}
        self._rows = {contig: self._merge(contig, found) for contig, found in rows.items()}

    def _parse(self, fields: list[str], line: int) -> Stretch:
        where = f"{self.path}: line {line}"
        if len(fields) < 4:
            raise DataError(f"{where}: has {len(fields)} columns; write contig, start, end, split")
        split = _ALIASES.get(fields[3].lower(), fields[3].lower())
        if split not in SPLITS:
            raise DataError(f"{where}: split {fields[3]!r} is not one of {', '.join(SPLITS)}")
        if not (all(re.fullmatch("[0-9]{1,18}", field) for field in fields[1:3]) and int(fields[1]) < int(fields[2])):
            raise DataError(f"{where}: start {fields[1]!r} and end {fields[2]!r} must be whole numbers, start < end")
        return Stretch(int(fields[1]), int(fields[2]), split)

    def _merge(self, contig: str, rows: list[tuple[Stretch, int]]) -> list[Stretch]:
        merged: list[Stretch] = []
        last_line = 0
        for row, line in sorted(rows):
            if merged and row.start < merged[-1].end and row.split != merged[-1].split:
                raise DataError(f"{self.path}: line {line}: {contig}:{row.start}-{row.end} ({row.split}) overlaps line "
                                f"{last_line} ({merged[-1].split}); splits may not share bases, cut one of the rows")
            if merged and row.start <= merged[-1].end and row.split == merged[-1].split:
                merged[-1] = merged[-1]._replace(end=max(merged[-1].end, row.end))
            else:
                merged.append(row)
            last_line = line
        return merged

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        if contig not in self._rows:
            return []
        row, line = self._last_row[contig]
        if row.end > bases:
            raise DataError(f"{self.path}: line {line}: {contig}:{row.start}-{row.end} lies outside its contig of "
                            f"{bases} bases; is this the BED of another assembly?")
        return self._rows[contig]

    def check_contigs(self, known: Collection[str]) -> None:
        for contig, (_, line) in self._last_row.items():
            if contig not in known:
                raise DataError(f"{self.path}: line {line}: contig {contig!r} is in none of the FASTA files; remove "
                                f"its rows, or check the names (chr1 or 1?)")
