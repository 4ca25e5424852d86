"""Rows of variants from a VCF or a table, and what each is on a reference: one that can be scored, or why it cannot.

Nothing is left out or repaired silently: each alternative allele of the file has one outcome of `OUTCOMES`.
"""

import csv
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from hyena_dist.config.errors import one_line
from hyena_dist.data.blocks import lines_of, refuse_other_kinds, start_of
from hyena_dist.data.contigs import ALLOWED
from hyena_dist.data.errors import DataError
from hyena_dist.data.reference import Reference, Stretch
from hyena_dist.data.seen import Seen
from hyena_dist.data.tokenizer import BYTE_TO_ID, A, T

OUTCOMES = {
    "scored": "the variant has scores",
    "duplicate": "a row before it is of the same variant; it has the scores of that one",
    "ref_mismatch": "REF is not what the reference has there",
    "unknown_base": "an allele, or the reference there, has a letter that is none of A, C, G and T",
    "no_alternative": "there is no alternative allele ('.'), or it is REF again",
    "star": "the allele is '*': a deletion before it has removed the place",
    "symbolic": "the allele is symbolic, as <DEL>, and has no sequence",
    "breakend": "the allele is a break-end",
    "unknown_contig": "the reference has no chromosome of this name",
    "outside": "the variant is not, or not wholly, within the reference's sequence",
    "contig_end": "the sequence ends so near that no window holds both alleles",
    "too_long": "an allele is longer than half a window",
    "malformed": "a column is missing, POS is no number from 1 on, or an allele is no sequence",
}
"""What can become of a row, and what it means."""
NOTES = ("lower_case", "renamed_contig", "window_cut")
"""What is said of a row that has scores: alleles in lower case; a chromosome whose name has, or lacks, chr; a window
that the sequence's end has cut."""

_COLUMNS = {
    "chrom": ("chrom", "#chrom", "chr", "chromosome", "contig", "seqname"),
    "pos": ("pos", "position", "position (hg19)", "pos_hg19_1based", "position (hg38)", "start_1based"),
    "ref": ("ref", "reference", "reference_allele", "ref_allele"),
    "alt": ("alt", "alternate", "alternative", "alternate_allele", "alt_allele"),
}
"""Names of the four columns that a table must have, in lower case."""
_FIXED = 8
"""Columns of a VCF without samples."""
_LINES_BEFORE_NAMES = 20
"""A table may have a title of so many lines before the names of its columns."""
_BREAKEND = re.compile(r"[\[\]]|^\.[A-Za-z]|[A-Za-z]\.$")
_LETTERS = frozenset(ALLOWED.decode())


class Row(NamedTuple):
    """One alternative allele of a file."""

    line: int
    """Of the file or the sheet, from 1; of parquet the row."""
    chrom: str
    pos: str
    ref: str
    alt: str
    others: list[str]
    """The values of the other columns, as `names_of` names them."""
    raw: bytes = b""
    """The whole line of a VCF."""
    allele: int = 0
    alleles: int = 1
    """Its number among the alternative alleles of its line, from 0, and how many they are."""


class Site(NamedTuple):
    """A variant on a reference, without the bases that its alleles share at their ends."""

    begin: int
    end: int
    """Of the reference's sequence that it is in; places are those of `Reference.ids`."""
    at: int
    """The first base that differs."""
    removed: int
    """So many bases of the reference are replaced,"""
    alt: np.ndarray
    """by these, uint8 [n] token ids."""


class Judged(NamedTuple):
    """A row and its outcome."""

    row: Row
    outcome: str
    site: Site | None
    """Of the first row of a variant with scores alone."""
    notes: tuple[str, ...]
    number: int | None
    """Of the variant whose scores the row has, from 0, in the order of their first rows."""
    repeated: Site | None
    """Of a duplicate."""


class Variants:
    """The rows of a file, as often as they are gone through; a row is held at a time.

    Raises:
        DataError: the file cannot be read, or is no VCF or table of variants.
    """

    def __init__(self, path: Path, *, is_vcf: bool) -> None:
        self.path, self.is_vcf = path, is_vcf
        start, packed = start_of(path, empty_is="the file is empty; give variants")
        self._is_parquet = not is_vcf and start.startswith(b"PAR1")
        if is_vcf and not start.startswith(b"##fileformat=VCF"):
            raise DataError(f"{path}: is no VCF, which begins with ##fileformat=VCF; give a table with --table, and of "
                            "a BCF make a VCF with `bcftools view`")
        if not is_vcf and start.startswith(b"##fileformat=VCF"):
            raise DataError(f"{path}: is a VCF: give it with --vcf")
        self._is_sheet = not is_vcf and start.startswith(b"PK")
        if not is_vcf and not self._is_parquet and not self._is_sheet:
            refuse_other_kinds(path, start, packed=packed, text="variants.tsv")
        self.header: list[bytes] = []
        """Lines of a VCF before its records."""
        self.names = self._names()

    def _names(self) -> list[str]:
        """Names of the columns that are carried over beside the four."""
        if self.is_vcf:
            for line in lines_of(self.path):
                if not line.startswith(b"#"):
                    break
                self.header.append(line)
            if not self.header or not self.header[-1].startswith(b"#CHROM"):
                raise DataError(f"{self.path}: has no line #CHROM before its records; it is cut short or damaged")
            return ["id", "info"]
        names, _ = self._columns()
        return [name for number, name in enumerate(names) if number not in self._places]

    def _columns(self) -> tuple[list[str], int]:
        """Names of all columns, and the line that has them; notes where the four are."""
        if self._is_parquet:
            names, number = list(self._parquet().schema_arrow.names), 0
            found = [names]
        else:
            found, number = [], 0
            rows = self._sheet_rows() if self._is_sheet else self._first_lines()
            for line, values in islice(rows, _LINES_BEFORE_NAMES):
                found.append(values)
                number = line
                if self._find(values) is not None:
                    break
            names = found[-1] if found else []
        places = self._find(names)
        if places is None:
            raise DataError(f"{self.path}: its columns are {', '.join(found[0] if found else [])[:200]!r}; name those "
                            f"of a variant {', '.join(_COLUMNS)} (tab or comma between them)")
        self._places = places
        return names, number

    def _first_lines(self) -> Iterator[tuple[int, list[str]]]:
        """Of text, without comments; from each it is seen anew what stands between the columns."""
        for number, line in enumerate(lines_of(self.path), 1):
            if not line.startswith(b"##"):
                text = line.decode("utf-8", "replace").removeprefix("\ufeff")
                self._comma = "\t" not in text
                yield number, self._split(text)

    def _sheet_rows(self) -> Iterator[tuple[int, list[str]]]:
        """Number and values of each row of the first sheet of a spreadsheet."""
        try:
            from openpyxl import load_workbook
            from openpyxl.utils.exceptions import InvalidFileException
        except ImportError:
            raise DataError(f"{self.path}: is a spreadsheet, which is read with openpyxl; install it with pip install "
                            "'hyena-dist[tables]', or save its sheet as text (.csv or .tsv)") from None
        damaged = (InvalidFileException, BadZipFile, zlib.error, KeyError, ValueError, SyntaxError, EOFError, OSError,
                   TypeError, AttributeError, IndexError)
        try:
            with self.path.open("rb") as file:
                sheet = load_workbook(file, read_only=True, data_only=True).worksheets[0]
                for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
                    yield number, [_cell(value) for value in row]
        except damaged as error:
            raise DataError(f"{self.path}: is no spreadsheet, or damaged ({one_line(error)}); save its sheet as text "
                            "(.csv or .tsv)") from error

    @staticmethod
    def _find(names: list[str]) -> list[int] | None:
        """Where the four columns are."""
        lower = [name.strip().lower() for name in names]
        found = [next((lower.index(name) for name in known if name in lower), None) for known in _COLUMNS.values()]
        return None if None in found else [place for place in found if place is not None]

    def _split(self, text: str) -> list[str]:
        if not self._comma:
            return text.split("\t")
        try:
            return [" ".join(value.split()) for value in next(csv.reader(io.StringIO(text)), [])]
        except csv.Error:
            return []

    def _parquet(self) -> Any:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise DataError(f"{self.path}: is parquet, which is read with pyarrow; install it with pip install "
                            "'hyena-dist[tables]'") from None
        try:
            return parquet.ParquetFile(self.path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{self.path}: is damaged ({one_line(error)}); copy or download it again") from None

    def is_record(self, line: bytes) -> bool:
        """Whether other readers of VCF go on behind a line. Of one that is cut short, or has no number for POS, htslib
        makes the end of the file."""
        fields = line.split(b"\t")
        named = self.header[-1].count(b"\t") + 1
        pos = fields[1] if len(fields) > 1 else b""
        return ((len(fields) == _FIXED or len(fields) >= max(_FIXED, named)) and b"\0" not in line
                and re.fullmatch(rb"[0-9]{0,18}", pos) is not None)

    def lines_without_record(self) -> int:
        """How many lines of a VCF behind its header `is_record` does not hold of."""
        return sum(not self.is_record(line) for line in lines_of(self.path) if line and not line.startswith(b"#"))

    def __iter__(self) -> Iterator[Row]:
        return self._vcf_rows() if self.is_vcf else self._table_rows()

    def _vcf_rows(self) -> Iterator[Row]:
        for number, line in enumerate(lines_of(self.path), 1):
            if line.startswith(b"#") or not line:
                continue
            fields = [field.decode("utf-8", "replace") for field in line.split(b"\t", _FIXED)]
            fields += [""] * (_FIXED - len(fields))
            chrom, pos, name, ref, alts, _, _, info = fields[:_FIXED]
            each = alts.split(",")
            for allele, alt in enumerate(each):
                yield Row(number, chrom, pos, ref, alt, [name, info], line, allele, len(each))

    def _table_rows(self) -> Iterator[Row]:
        names, first = self._columns()
        others = [number for number in range(len(names)) if number not in self._places]
        rows = (self._parquet_values() if self._is_parquet else self._sheet_values(first) if self._is_sheet
                else self._text_values(first))
        for number, values in rows:
            values = [*values, *[""] * (len(names) - len(values))]
            chrom, pos, ref, alt = (values[place].strip() for place in self._places)
            yield Row(number, chrom, pos, ref, alt, [values[place] for place in others])

    def _text_values(self, first: int) -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines_of(self.path), 1):
            if number > first and line.strip():
                yield number, self._split(line.decode("utf-8", "replace"))

    def _sheet_values(self, first: int) -> Iterator[tuple[int, list[str]]]:
        for number, values in self._sheet_rows():
            if number > first and any(values):
                yield number, values

    def _parquet_values(self) -> Iterator[tuple[int, list[str]]]:
        number = 0
        for batch in self._parquet().iter_batches(batch_size=4096):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, ["" if value is None else " ".join(str(value).split()) for value in values]


def _cell(value: object) -> str:
    """A value of a spreadsheet, in which whole numbers may be written as others."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else " ".join(str(value).split())


def judge(rows: Iterable[Row], reference: Reference, window: int) -> Iterator[Judged]:
    """What each row is.

    Args:
        window: bases of a window; half of it is what an allele may have.
    """
    with Seen() as seen:
        for row in rows:
            outcome, site, notes = _judge(row, reference, window)
            if site is None:
                yield Judged(row, outcome, None, (), None, None)
                continue
            number, is_first = seen.number(site.at, site.removed, site.alt.tobytes())
            yield (Judged(row, outcome, site, notes, number, None) if is_first else
                   Judged(row, "duplicate", None, notes, number, site))


def _judge(row: Row, reference: Reference, window: int) -> tuple[str, Site | None, tuple[str, ...]]:
    if not (row.pos.isascii() and row.pos.isdigit() and len(row.pos) < 19 and int(row.pos) > 0
            and row.chrom and row.ref and _LETTERS.issuperset(row.ref)):
        return "malformed", None, ()
    if outcome := _without_sequence(row):
        return outcome, None, ()
    name = reference.find(row.chrom)
    if name is None:
        return "unknown_contig", None, ()
    start = int(row.pos) - 1
    stretch = next((each for each in reference.stretches[name]
                    if each.place.start <= start and start + len(row.ref) <= each.place.end), None)
    if stretch is None:
        return "outside", None, ()
    at = stretch.begin + start - stretch.place.start
    ref, alt = (BYTE_TO_ID[np.frombuffer(allele.encode(), np.uint8)] for allele in (row.ref, row.alt))
    there = reference.ids[at : at + ref.size]
    if any(((ids < A) | (ids > T)).any() for ids in (ref, alt, there)):
        return "unknown_base", None, ()
    if not np.array_equal(ref, there):
        return "ref_mismatch", None, ()
    if np.array_equal(ref, alt):
        return "no_alternative", None, ()
    site = _trimmed(stretch, at, ref, alt)
    if outcome := _without_window(site, window):
        return outcome, None, ()
    start, length = window_of(site, window)
    notes = ((row.ref + row.alt) != (row.ref + row.alt).upper(), name != row.chrom, length < window)
    return "scored", site, tuple(note for note, holds in zip(NOTES, notes, strict=True) if holds)


def _without_sequence(row: Row) -> str:
    """The outcome of an alternative allele that is no sequence; nothing of one that is."""
    if row.alt == ".":
        return "no_alternative"
    if row.alt == "*" or row.alt == "<*>":
        return "star"
    if _BREAKEND.search(row.alt):
        return "breakend"
    if row.alt.startswith("<") and row.alt.endswith(">"):
        return "symbolic"
    return "" if row.alt and _LETTERS.issuperset(row.alt) else "malformed"


def _trimmed(stretch: Stretch, at: int, ref: np.ndarray, alt: np.ndarray) -> Site:
    """The variant without what its alleles share: first at their ends, then at their starts."""
    shorter = min(ref.size, alt.size)
    same = ref[ref.size - shorter :] == alt[alt.size - shorter :]
    behind = int(np.argmin(same[::-1])) if not same.all() else shorter
    ref, alt = ref[: ref.size - behind], alt[: alt.size - behind]
    shorter = min(ref.size, alt.size)
    same = ref[:shorter] == alt[:shorter]
    before = int(np.argmin(same)) if not same.all() else shorter
    return Site(stretch.begin, stretch.end, at + before, ref.size - before, alt[before:])


def window_of(site: Site, window: int) -> tuple[int, int]:
    """Where the windows of a variant start, in `Reference.ids`, and how many bases both have: the same of the reference
    allele and of the other, whose far border moves. The variant is in their middle, and the ends of the sequence cut
    them."""
    middle = site.at - window // 2
    start = max(middle, site.begin)
    return start, min(middle + window, site.end, site.end + site.alt.size - site.removed) - start


def _without_window(site: Site, window: int) -> str:
    longest = max(site.removed, site.alt.size)
    if longest + 1 > window - window // 2:
        return "too_long"
    start, length = window_of(site, window)
    return "contig_end" if site.at + longest > start + length or length < 2 else ""
