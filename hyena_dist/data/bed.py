"""BED files: stretches of contigs, plain or in gzip, with what to do about rows that no contig holds."""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hyena_dist.config.kinds import kind_of_text
from hyena_dist.data.blocks import lines_of, refuse_other_kinds, start_of
from hyena_dist.data.errors import DataError

_BROWSER_WORDS = ("position", "hide", "dense", "pack", "squish", "full")
_LINE = 1 << 16
"""Bytes that a line of a BED may have."""

Span = tuple[int, int]
"""First base and end of a stretch."""


class Row(NamedTuple):
    """A row of a BED: bases [start, end) of a contig."""

    start: int
    end: int
    name: str
    """The fourth column; "" where there is none."""
    line: int


def is_of_a_browser(fields: list[str]) -> bool:
    """Whether a line tells a genome browser how to show the rows. One that is a row of a contig of that name is not."""
    if fields[0] == "track":
        return len(fields) == 1 or "=" in fields[1]
    return fields[0] == "browser" and (len(fields) == 1 or fields[1] in _BROWSER_WORDS)


def text_rows(path: Path, kind: str = "a BED file") -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line of a table but comments, empty lines and those for a genome browser. Tabs stand
    between the fields of a line that has any, so that a field may hold blanks or nothing; else blanks do.

    Raises:
        DataError: it cannot be read, is not text of UTF-8, or has a line that no table has.
    """
    start, packed = start_of(path, empty_is=f"holds no rows; give {kind}")
    if kind_of_text(start):  # of what is text only that which stands in for another file
        refuse_other_kinds(path, start, packed=packed, text="converted.bed")
    for number, line in enumerate(lines_of(path, most=_LINE), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: cannot be read: line {number}: {error}; give {kind} as plain text of "
                            f"UTF-8") from None
        if text and not text.startswith("#") and not is_of_a_browser(text.split()):
            yield number, [field.strip() for field in text.split("\t")] if "\t" in text else text.split()


def span_of(fields: list[str], where: str, least: int = 3, columns: str = "contig, start, end", *,
            empty: bool = False) -> Span:
    """Start and end of a row.

    Args:
        where: file and line, for messages.
        least, columns: as of `Bed`.
        empty: whether a row may have no base, as BED writes a place between two bases.

    Raises:
        DataError: it has fewer columns, one of them is empty, or its numbers are no stretch.
    """
    if len(fields) < least:
        raise DataError(f"{where}: has {len(fields)} columns; write {columns}, with a tab before each but the first")
    if "" in fields[:least]:
        raise DataError(f"{where}: column {fields.index('') + 1} is empty; write {columns}")
    if not (all(re.fullmatch("[0-9]{1,18}", field) for field in fields[1:3])
            and int(fields[1]) < int(fields[2]) + empty):
        order = "start <= end" if empty else "start < end"
        raise DataError(f"{where}: start {fields[1]!r} and end {fields[2]!r} must be whole numbers, {order}")
    return int(fields[1]), int(fields[2])


class Bed:
    """The rows of a BED by contig.

    Args:
        cut: rows that reach past the end of their contig are cut to it, and those that lie behind it or name a contig
            that no file has are left out, instead of refused; `note` says how many.
        least: columns that a row must have.
        columns: what they are, for messages.
    """

    def __init__(self, path: Path, *, cut: bool = False, least: int = 3, columns: str = "contig, start, end"):
        self.path, self.cut, self.count = path, cut, 0
        self.rows: dict[str, list[Row]] = {}
        for number, fields in text_rows(path):
            start, end = span_of(fields, f"{path}: line {number}", least, columns)
            name = fields[3] if len(fields) > 3 else ""
            self.rows.setdefault(fields[0], []).append(Row(start, end, name, number))
            self.count += 1
        if not self.rows:
            raise DataError(f"{path}: holds no rows; write lines of {columns}")
        self._outside: dict[str, tuple[int, int, int]] = {}
        """Of each contig: rows that were cut, rows that were left out, and their bases outside."""

    def of(self, contig: str, bases: int) -> list[Row]:
        """The rows of a contig of this many bases.

        Raises:
            DataError: one reaches past its end, and is not to be cut.
        """
        rows = self.rows.get(contig, [])
        past = [row for row in rows if row.end > bases]
        if not past:
            return rows
        if not self.cut:
            row = max(past, key=lambda row: row.end)
            raise DataError(f"{self.path}: line {row.line}: {contig}:{row.start}-{row.end} lies outside its contig of "
                            f"{bases} bases; is this the BED of another assembly? --cut-bed cuts such rows")
        dropped = sum(row.start >= bases for row in past)
        self._outside[contig] = (len(past) - dropped, dropped, sum(row.end - max(row.start, bases) for row in past))
        return [row._replace(end=min(row.end, bases)) for row in rows if row.start < bases]

    def check_contigs(self, known: Collection[str]) -> None:
        """Raises DataError: a row is of none of these contigs, and is not to be left out."""
        for contig, rows in self.rows.items():
            if contig in known:
                continue
            if not self.cut:
                raise DataError(f"{self.path}: line {rows[0].line}: contig {contig!r} is in none of the files; "
                                f"remove its rows, or check the names (chr1 or 1?); --cut-bed leaves such "
                                f"rows out")
            self._outside[contig] = (0, len(rows), sum(row.end - row.start for row in rows))

    def note(self) -> list[str]:
        """A line on the rows that were cut or left out, where there are any."""
        if not self._outside:
            return []
        cut, dropped, bases = (sum(counts) for counts in zip(*self._outside.values(), strict=True))
        return [f"{self.path}: of {self.count:,} rows {cut:,} were cut at the end of their contig and {dropped:,} left "
                f"out, which lie behind it or name a contig that no file has: {bases:,} bases"]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same bases as spans in order that neither overlap nor touch."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def overlap(start: int, end: int, spans: list[Span]) -> list[Span]:
    """The parts of [start, end) inside merged spans."""
    found = []
    for i in range(max(bisect_right(spans, (start, 1 << 62)) - 1, 0), len(spans)):
        if spans[i][0] >= end:
            break
        if spans[i][1] > start:
            found.append((max(start, spans[i][0]), min(end, spans[i][1])))
    return found


def without(start: int, end: int, spans: list[Span]) -> list[Span]:
    """The parts of [start, end) outside merged spans."""
    edges = [start, *(edge for span in overlap(start, end, spans) for edge in span), end]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
