"""Tables of variants as text, as a spreadsheet or as parquet, whose columns are known by their names."""

import csv
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from hyena_dist.config.errors import one_line
from hyena_dist.config.kinds import UTF8_MARK
from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import lines_of, refuse_other_kinds, said_in_one_line
from hyena_dist.data.errors import DataError

_COLUMNS = {
    "chrom": ("chrom", "chr", "chromosome", "contig", "seqname"),
    "pos": ("pos", "position", "position (hg19)", "pos_hg19_1based", "position (hg38)", "start_1based"),
    "ref": ("ref", "reference", "reference_allele", "ref_allele"),
    "alt": ("alt", "alternate", "alternative", "alternate_allele", "alt_allele"),
}
"""Names of the four columns that a table must have, in lower case."""
_BETWEEN = ("\t", ",", ";", " ")
"""What may stand between columns, the likeliest first: it is that by which the four are found."""
_LINES_BEFORE_NAMES = 20
"""A table may have a title of so many lines before the names of its columns."""
_ROW_NAMES = "row_name"
"""What we call the column of which R writes the values and no name."""
_ROWS = 4096
"""Of parquet that are read at a time."""
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]{1,2})?")


class VariantTable:
    """The rows of a table, as often as they are gone through; a row is held at a time.

    Args:
        start, packed: the first bytes of the file, and whether they were packed by gzip.

    Raises:
        DataError: the file cannot be read, or its columns are not those of variants.
    """

    def __init__(self, path: Path, start: bytes, *, packed: bool) -> None:
        self.path = path
        self.is_parquet, self._is_sheet = start.startswith(b"PAR1"), start.startswith(b"PK")
        if not self.is_parquet and not self._is_sheet:
            refuse_other_kinds(path, start.removeprefix(UTF8_MARK), packed=packed, text="variants.tsv")
        csv.field_size_limit(1 << 31)
        self._between, self._header = "\t", 0
        self.names: list[str] = []
        self.places: list[int] = []
        """Numbers of the columns of chromosome, place, reference and alternative."""
        self._find_columns()
        self.others = [number for number in range(len(self.names)) if number not in self.places]
        """Numbers of the other columns."""

    def _find_columns(self) -> None:
        first: list[str] = []
        for number, between, names in self._candidates():
            first = first or names
            if (places := _places(names)) is not None:
                self._between, self._header, self.names, self.places = between, number, names, places
                break
        else:
            raise DataError(f"{self.path}: its columns are {', '.join(first)[:200]!r}; name those of a variant "
                            f"{', '.join(_COLUMNS)} (tab or comma between them)")
        _, row = (0, []) if self.is_parquet or self._is_sheet else next(self._text_rows(), (0, []))
        behind = [place + 1 for place in self.places]
        if len(row) == len(self.names) + 1 and _fits(row, behind) and not _fits(row, self.places):
            self.names, self.places = [_ROW_NAMES, *self.names], behind

    def _candidates(self) -> Iterator[tuple[int, str, list[str]]]:
        """Number of a line that may have the names of the columns, what may stand between these, and they."""
        if self.is_parquet:
            yield 0, "", list(self.parquet_schema().names)
        elif self._is_sheet:
            for number, values in islice(self._sheet_rows(), _LINES_BEFORE_NAMES):
                yield number, "", values
        else:
            lines = ((number, text) for number, text in self._texts() if not text.startswith("##"))
            for number, text in islice(lines, _LINES_BEFORE_NAMES):
                for between in _BETWEEN:
                    yield number, between, _split(text, between)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the line, or of the row of parquet, and the values of all columns.

        Raises:
            DataError: the file cannot be read, or is damaged.
        """
        found = self._parquet_rows() if self.is_parquet else self._sheet_rows() if self._is_sheet else self._text_rows()
        for number, values in found:
            if number > self._header:
                values += [""] * (len(self.names) - len(values))
                for place in self.places:
                    values[place] = values[place].strip()
                values[self.places[1]] = _whole(values[self.places[1]])
                yield number, values

    def _texts(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(lines_of(self.path), 1):
            if number == 1:
                line = line.removeprefix(UTF8_MARK)
            yield number, line.decode("utf-8", "replace")

    def _text_rows(self) -> Iterator[tuple[int, list[str]]]:
        for number, text in self._texts():
            if number > self._header and text.strip():
                yield number, _split(text, self._between)

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
                    values = [_cell(value) for value in row]
                    if any(values):
                        yield number, values
        except damaged as error:
            raise DataError(f"{self.path}: is no spreadsheet, or damaged ({one_line(error)}); save its sheet as text "
                            "(.csv or .tsv)") from error

    def parquet_schema(self) -> Any:
        """The schema of a parquet file.

        Raises:
            DataError: it cannot be read, or is damaged.
        """
        with self._opened() as table:
            return table.schema_arrow

    def batches(self) -> Iterator[Any]:
        """The rows of a parquet file as record batches, all columns of it.

        Raises:
            DataError: it cannot be read, or is damaged.
        """
        with self._opened() as table:
            yield from table.iter_batches(batch_size=_ROWS)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A parquet file, of which all that is damaged ends in one line."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise DataError(f"{self.path}: is parquet, which is read with pyarrow; install it with pip install "
                            "'hyena-dist[tables]'") from None
        with said_in_one_line(self.path), open_regular(self.path) as file:
            try:
                yield parquet.ParquetFile(file)
            except (ArrowException, ValueError, OverflowError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what was read
                    raise
                raise DataError(f"{self.path}: is damaged ({one_line(error)}); copy or download it again") from None

    def _parquet_rows(self) -> Iterator[tuple[int, list[str]]]:
        number = 0
        with self._opened() as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield number, [_cell(value) if place in self.places else _text(value)
                                   for place, value in enumerate(values)]


def _places(names: list[str]) -> list[int] | None:
    """Where the four columns are."""
    lower = [name.strip().lower().removeprefix("#") for name in names]
    found = [next((lower.index(name) for name in known if name in lower), None) for known in _COLUMNS.values()]
    return None if None in found else [place for place in found if place is not None]


def _fits(row: list[str], places: list[int]) -> bool:
    """Whether a number and a sequence stand where those of a variant are."""
    return _NUMBER.fullmatch(row[places[1]]) is not None and row[places[2]].isalpha()


def _split(text: str, between: str) -> list[str]:
    """The fields of a line, some of which may stand in quotes; none where the quotes are in disorder and commas cannot
    be told from those inside of a field."""
    if between == "\t" and '"' not in text:
        return text.split("\t")
    try:
        reader = csv.reader(io.StringIO(text), delimiter=between, strict=True, skipinitialspace=between == " ")
        return [" ".join(value.split()) for value in next(reader, [])]
    except csv.Error:
        return text.split("\t") if between == "\t" else []


def _text(value: object) -> str:
    return "" if value is None else " ".join(str(value).split())


def _cell(value: object) -> str:
    """As `_text`, of a value that may be a whole number though it is none by its kind: so are those of a spreadsheet,
    and those of a column of parquet that has a missing value."""
    return _text(int(value) if isinstance(value, float) and value.is_integer() else value)


def _whole(text: str) -> str:
    """A place as a whole number: pandas writes 2000 as 2000.0 where the column has a missing value, and R 100000 as
    1e+05. Other texts are left as they are."""
    if text.isdigit() or not _NUMBER.fullmatch(text):
        return text
    value = Decimal(text)
    return str(int(value)) if value == value.to_integral_value() else text
