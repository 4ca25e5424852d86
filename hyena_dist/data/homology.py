"""Homologous regions: what is alike to held-out sequence does not train.

A file says which regions are homologous, in one of three forms:

    BED                  contig, start, end, name: the rows of one name are homologous to each other
    BLAST, -outfmt 6     twelve columns or more, of which 1 and 2 are contigs, 7 to 10 the places of the hit, from 1 on
    pairs of regions     contig:start-end, contig:start-end and a score, as hashFrag writes, from 0 on

In the last two, a query or subject may be a piece of a contig, `chr2:1000-1500` (as bedtools getfasta calls it, from 0
on); its places are then inside that piece. Each hit stands for itself: what is alike to something that is alike to
held-out sequence trains, unless the table has that hit, too.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from hyena_dist.data.bed import Span, merged, overlap, text_rows, without
from hyena_dist.data.errors import DataError
from hyena_dist.data.splits import Splits, Stretch

_PIECE = re.compile(r"(.+):(\d{1,18})-(\d{1,18})(?:\([+-.]\))?")
_BLAST_COLUMNS = 12


class Region(NamedTuple):
    """Bases [start, end) of a contig, which are homologous to all others of the family."""

    contig: str
    start: int
    end: int
    family: str
    line: int


def _piece(name: str) -> tuple[str, int, int] | None:
    """Contig, start and end of `contig:start-end`."""
    found = _PIECE.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found and int(found[2]) < int(found[3]) else None


def _hit(name: str, first: str, last: str) -> tuple[str, int, int]:
    """Contig and bases of a hit of BLAST. Raises ValueError: its places are no numbers."""
    start, end = sorted((int(first), int(last)))
    if start < 1:
        raise ValueError
    contig, shift = name, 0
    if piece := _piece(name):
        contig, shift = piece[:2]
    return contig, shift + start - 1, shift + end


def read_regions(path: Path) -> list[Region]:
    """The regions of a file of homologies.

    Raises:
        DataError: it cannot be read, or a line is of none of the three forms, or of another than the first.
    """
    regions: list[Region] = []
    form = ""
    for number, fields in text_rows(path, "a BED of regions or a table of BLAST hits"):
        where = f"{path}: line {number}"
        pieces = [_piece(field) for field in fields[:2]]
        found = ("BLAST" if len(fields) >= _BLAST_COLUMNS and "." in fields[2] else
                 "pairs" if len(pieces) == 2 and all(pieces) else "BED")
        if form not in ("", found):
            raise DataError(f"{where}: is of the form {found}, the lines before are {form}; give one form in a file")
        form = found
        try:
            if form == "BED":
                start, end = int(fields[1]), int(fields[2])
                if not 0 <= start < end or not any(fields[3:4]):
                    raise ValueError
                regions.append(Region(fields[0], start, end, fields[3], number))
                continue
            ends = ([_hit(fields[0], *fields[6:8]), _hit(fields[1], *fields[8:10])] if form == "BLAST" else
                    [piece for piece in pieces if piece])
            regions += [Region(*end, f"line {number}", number) for end in ends]
        except (ValueError, IndexError):
            raise DataError(f"{where}: is no row of contig, start, end, name; nor twelve columns of BLAST (-outfmt 6); "
                            f"nor a pair of contig:start-end") from None
    if not regions:
        raise DataError(f"{path}: holds no rows; give a BED of regions or a table of BLAST hits")
    return regions


class Apart(Splits):
    """What other splits choose, but no base trains in a region of which the family has a held-out base.

    Args:
        splits: what is chosen from.
        path: the file of homologies.
        lengths: bases of each contig.
        cut: regions outside of all contigs are left out, not refused.
    """

    def __init__(self, splits: Splits, path: Path, lengths: dict[str, int], *, cut: bool = False):
        self._splits, self._path = splits, path
        self.asked_by, self.of_each_contig = splits.asked_by, splits.of_each_contig
        self._outside = 0
        self._left_out: dict[str, int] = {}
        chosen = {contig: splits.stretches(contig, bases) for contig, bases in lengths.items()}
        held = {contig: merged(row[:2] for row in rows if row.split != "train") for contig, rows in chosen.items()}
        families: dict[str, list[Region]] = {}
        for region in read_regions(path):
            if self._inside(region, lengths, cut):
                families.setdefault(region.family, []).append(region)
        told = [family for family in families.values()
                if any(overlap(row.start, row.end, held[row.contig]) for row in family)]
        self._families = len(told)
        apart: dict[str, list[Span]] = {}
        for row in (row for family in told for row in family):
            apart.setdefault(row.contig, []).append((row.start, row.end))
        self._apart = {contig: merged(spans) for contig, spans in apart.items()}

    def _inside(self, region: Region, lengths: dict[str, int], cut: bool) -> bool:
        bases = lengths.get(region.contig)
        if bases is not None and region.end <= bases:
            return True
        self._outside += 1
        if not cut:
            why = "is in none of the files" if bases is None else f"has {bases:,} bases"
            raise DataError(f"{self._path}: line {region.line}: region {region.contig}:{region.start}-{region.end}: "
                            f"the contig {why}; is this of another assembly? --cut-bed leaves such regions out")
        return bases is not None and region.start < bases

    @property
    def wanted(self) -> Collection[str]:  # type: ignore[override]
        return self._splits.wanted

    def stretches(self, contig: str, bases: int) -> list[Stretch]:
        apart, kept = self._apart.get(contig, []), []
        chosen = self._splits.stretches(contig, bases)
        for row in chosen:
            spans = without(row.start, row.end, apart) if row.split == "train" else [row[:2]]
            kept += [Stretch(start, end, row.split) for start, end in spans]
        self._left_out[contig] = sum(row.end - row.start for row in chosen) - sum(row.end - row.start for row in kept)
        return kept

    def check_contigs(self, known: Collection[str]) -> None:
        self._splits.check_contigs(known)

    def notes(self) -> list[str]:
        outside = f"; {self._outside:,} regions lie outside of the files" if self._outside else ""
        return [*self._splits.notes(),
                f"{self._path}: {sum(self._left_out.values()):,} bases do not train, of {self._families:,} families "
                f"with held-out bases{outside}"]
