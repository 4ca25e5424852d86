"""Rows of a table of labelled intervals: BED of four to six columns, or any order of columns under a header."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hyena_dist.data.bed import is_of_a_browser, span_of
from hyena_dist.data.errors import DataError

_NAMES = {
    "contig": frozenset({"chrom", "chromosome", "chr", "contig", "region", "seqname", "seqnames", "seqid"}),
    "start": frozenset({"start", "chromstart", "begin", "start_pos"}),
    "end": frozenset({"end", "chromend", "stop", "end_pos"}),
    "strand": frozenset({"strand"}),
}
"""What people call the columns of an interval, in lower case and without a # in front."""
_STRANDS = ("+", "-", ".")


class Interval(NamedTuple):
    """Bases [start, end) of a contig, with what its row says of them."""

    contig: str
    start: int
    end: int
    strand: str
    """+, - or . (as +)."""
    label: str
    split: str | None
    """None where there is no such column."""
    where: str
    """File and line, for messages."""


def is_no_row(line: str) -> bool:
    """Whether a line is empty, a comment, or for a genome browser. A header may begin with a # too."""
    fields = line.split()
    return not fields or is_of_a_browser(fields) or (line.startswith("#") and not _is_header(_names_of(line)))


def intervals_in(path: Path, rows: Iterable[tuple[int, list[str]]], label: str,
                 split: str | None) -> Iterator[Interval]:
    """The intervals of a table.

    Args:
        rows: number and fields of each line.
        label: the column of labels under a header; "": the table has none. Without a header it is the fourth.
        split: the column of splits; None: that called split, where there is one.

    Raises:
        DataError: a column is missing, or a row is no interval.
    """
    places: dict[str, int] = {}
    first = 0
    """The line of the first row where no header is above it."""
    for line, fields in rows:
        where, fields = f"{path}: line {line}", [field.strip() for field in fields]
        if not places:
            if _is_header(_plain(fields)):
                places = _under_header(fields, label, split, where)
                continue
            places, first = _as_bed(fields, label, where), line
        if len(fields) <= max(places.values()):
            columns = ", ".join(sorted(places, key=places.__getitem__))
            raise DataError(f"{where}: has {len(fields)} columns; write {columns}, separated by tabs")
        said = {name: fields[place] for name, place in places.items()}
        start, end = span_of([said["contig"], said["start"], said["end"]], where)
        strand = said.get("strand", "+")
        if strand not in _STRANDS:
            raise DataError(f"{where}: strand {strand!r} must be +, - or .")
        own = strand_of_bed(fields) if first else places.get("strand")
        if (strand == "-") != (own is not None and fields[own] == "-"):
            raise DataError(f"{where}: by its own columns the strand is another than by those of line {first}, the "
                            "first row, by which all rows are read: give every row the same columns, or write a header "
                            "that names them (chrom, start, end, strand)")
        yield Interval(said["contig"], start, end, strand, said.get("label", ""), said.get("split"), where)


def _as_bed(fields: list[str], label: str, where: str) -> dict[str, int]:
    """Columns of rows without a header."""
    places = {"contig": 0, "start": 1, "end": 2} | ({"label": 3} if label else {})
    if strand := strand_of_bed(fields):
        places["strand"] = strand
    if len(fields) > 2 and not any(field.isdigit() for field in fields):
        raise DataError(f"{where}: {', '.join(fields)[:200]!r} is neither an interval nor a header: a header names "
                        "the contig (chrom), start and end")
    return places


def strand_of_bed(fields: list[str]) -> int | None:
    """Where a row without a header has its strand: in the sixth column, as in BED; of five in the last; or nowhere."""
    if len(fields) > 5 and fields[5] in _STRANDS and fields[4] not in ("+", "-"):
        return 5
    return 4 if len(fields) > 4 and fields[4] in _STRANDS else None


def _under_header(header: list[str], label: str, split: str | None, where: str) -> dict[str, int]:
    names = _plain(header)
    places = {}
    for role, known in _NAMES.items():
        found = [place for place, name in enumerate(names) if name in known]
        if len(found) > 1 or (not found and role != "strand"):
            said = f"{len(found)} columns" if found else "no column"
            raise DataError(f"{where}: the header {', '.join(header)[:200]!r} has {said} of the {role}: one must be "
                            f"called {', '.join(sorted(known))}")
        if found:
            places[role] = found[0]
    for role, wanted in (("label", label), ("split", split or ("split" if "split" in header else ""))):
        if wanted:
            if header.count(wanted) != 1:
                how = "twice" if wanted in header else "not"
                raise DataError(f"{where}: the column {wanted!r} is {how} in the header {', '.join(header)[:200]!r}; "
                                f"name the right one with finetune.{role}_column")
            places[role] = header.index(wanted)
    return places


def _is_header(names: list[str]) -> bool:
    """Whether a row names columns: two of an interval's, or the first is a contig's and no number follows."""
    of_interval = [name for name in names if any(name in known for known in _NAMES.values())]
    return len(of_interval) > 1 and not any(name.isdigit() for name in names)


def _names_of(line: str) -> list[str]:
    return _plain(line.replace(",", "\t").split("\t"))


def _plain(fields: list[str]) -> list[str]:
    return [field.strip().lstrip("#").strip().lower() for field in fields]
