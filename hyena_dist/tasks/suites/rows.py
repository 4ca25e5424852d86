"""Labelled sequences from rows of a suite's tables, and from intervals of a genome."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyena_dist.data.contigs import Source, sequence
from hyena_dist.data.errors import DataError
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.tables import Example, rows_of

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
FASTAS = (".fna", ".fna.gz", ".fa", ".fa.gz", ".fasta", ".fasta.gz")


def with_ending(stem: Path, endings: Sequence[str] = (*FASTAS, *TABLES)) -> list[Path]:
    """The file of this name with one of these endings, or the numbered parts of it that Hugging Face writes, as
    train-00000-of-00002.parquet or train-00000-of-00001-a09b74b3ef9c3b56.parquet, all of them in order.

    Raises:
        DataError: there are several, or a part is missing.
    """
    found = [path for ending in endings if (path := stem.with_name(stem.name + ending)).is_file()]
    pattern = re.compile(rf"{re.escape(stem.name)}-([0-9]{{5}})-of-([0-9]{{5}})(-[0-9a-f]+)?[.]parquet")
    matches = sorted((match[1], match[2], path) for path in (stem.parent.iterdir() if stem.parent.is_dir() else ())
                     if (match := pattern.fullmatch(path.name)))
    if len(found) + bool(matches) > 1:
        names = ", ".join(path.name for path in (*found, *(path for _, _, path in matches[:1])))
        raise DataError(f"{stem.parent}: {names} are all of {stem.name}: remove all but one")
    numbers, counts = [int(number) for number, _, _ in matches], sorted({count for _, count, _ in matches})
    if len(counts) > 1 or len(set(numbers)) < len(numbers):
        names = ", ".join(path.name for _, _, path in matches)
        raise DataError(f"{stem.parent}: {names[:300]} are parts of {stem.name} from several downloads: keep those of "
                        "one")
    if counts and numbers != list(range(int(counts[0]))):
        raise DataError(f"{stem.parent}: {stem.name} has {len(matches)} of {int(counts[0])} parts: copy or download "
                        "the others")
    return found or [path for _, _, path in matches]


def table_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and values of each row of a table that has these columns.

    Raises:
        DataError: a column is missing or comes twice, or as `rows_of`.
    """
    def check(header: list[str]) -> None:
        for name in wanted:
            if header.count(name) != 1:
                how = "twice" if name in header else "not"
                raise DataError(f"{path}: line 1: the column {name!r} is {how} in the header "
                                f"{', '.join(header)[:200]!r}: give the file as its authors publish it")

    return rows_of(path, check)


def example_of(values: Mapping[str, str], where: str, split: str, *, bases: str = "sequence",
               label: str = "label") -> Example:
    """The labelled sequence of a row.

    Raises:
        DataError: it has no sequence, no label, or letters that no sequence has.
    """
    found = sequence(values[bases].strip().encode(), where).tobytes()
    if not (said := values[label].strip()):
        raise DataError(f"{where}: has no label in column {label!r}: copy or download the file again")
    return Example(values.get("name") or where.rpartition(" ")[2], found, said, where, split)


class Interval(NamedTuple):
    """Bases [start, end) of a contig, with what is known of them."""

    contig: str
    start: int
    end: int
    label: str
    split: str
    where: str
    reverse: bool = False

    @property
    def name(self) -> str:
        return f"{self.contig}:{self.start}-{self.end}" + "(-)" * self.reverse


def whole_number(values: Mapping[str, str], column: str, where: str) -> int:
    """The number in a column, which some programs write as 1234.0.

    Raises:
        DataError: it is no whole number from 0 on.
    """
    text = values[column].strip().removesuffix(".0")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise DataError(f"{where}: {column} is {values[column]!r}, no whole number from 0 on: copy or download the "
                        "file again")
    return int(text)


def filled(bases: np.ndarray, start: int, end: int) -> bytes:
    """Bases [start, end) of a contig, with N where it has none."""
    before = min(max(-start, 0), end - start)
    return (b"N" * before + bases[max(start, 0) : max(end, 0)].tobytes()).ljust(end - start, b"N")


def cut(intervals: Sequence[Interval], genome: Path, *, outside: str,
        spellings: Callable[[str], Iterable[str]] = lambda name: (name,)) -> Iterator[tuple[Interval, bytes]]:
    """The bases of intervals, on the strand that the file has, contig by contig: a genome is not kept in memory.

    Args:
        outside: what becomes of an interval that reaches past its contig: refuse; drop, it is not given; or fill, N
            stands where there is no base.
        spellings: names that the intervals may have for a contig of the file.

    Raises:
        DataError: a contig is not in the file, or an interval reaches past it and is to be refused.
    """
    of_contig: dict[str, list[Interval]] = {}
    for interval in intervals:
        of_contig.setdefault(interval.contig, []).append(interval)
    for contig in read_contigs([Source(genome)]):
        called = next((name for name in spellings(contig.name) if name in of_contig), "")
        for interval in of_contig.pop(called, []):
            inside = 0 <= interval.start < interval.end <= len(contig.bases)
            if not inside and outside == "drop":
                continue
            if not inside and (outside == "refuse" or interval.start >= interval.end):
                raise DataError(f"{interval.where}: {interval.name} lies outside the {len(contig.bases):,} bases of "
                                f"its contig in {genome}: is it of another assembly?")
            yield interval, filled(contig.bases, interval.start, interval.end)
        if not of_contig:
            return
    interval = next(iter(of_contig.values()))[0]
    raise DataError(f"{interval.where}: contig {interval.contig!r} is not in {genome}: is it the right genome (chr1 or "
                    "1?)")
