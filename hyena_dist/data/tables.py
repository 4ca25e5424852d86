"""Labelled sequences of a file: CSV, TSV and parquet with a header, FASTA with labels in its headers, intervals with a
genome. What a file is, its content says; any but parquet may be packed by gzip.

Nothing is mended in silence: a sequence with a letter that no sequence has, a row without a label or with too few
columns, and an interval outside its contig are refused with the place where they stand.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import one_line
from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import lines_of, no_report, said_in_one_line, start_of
from hyena_dist.data.blocks import refuse_other_kinds as refuse_kinds
from hyena_dist.data.contigs import Source, as_dna, sequence
from hyena_dist.data.errors import DataError
from hyena_dist.data.interval_rows import Interval, intervals_in, is_no_row
from hyena_dist.data.places import Values, beside, open_array, written
from hyena_dist.data.sources import read_contigs

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
"""The words that people write for a split, in lower case, and what they mean here."""
_COMPLEMENT = bytes.maketrans(b"ACGTURYSWKMBDHVNacgturyswkmbdhvn", b"TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


NO_LABEL = "-"
"""What a row says that has none of several labels."""


@dataclass(frozen=True)
class Cut:
    """An interval of a contig, whose bases are cut out when they are asked for: overlapping intervals of a million
    bases would not fit into memory."""

    contig: bytes = field(repr=False)
    start: int
    end: int
    reverse: bool
    """Whether the other strand is meant."""

    @property
    def bases(self) -> bytes:
        bases = self.contig[self.start : self.end]
        return reverse_complement(bases) if self.reverse else bases

    def part(self, first: int, bases: int) -> "Cut":
        """So many of its bases, from one on."""
        start = self.end - first - bases if self.reverse else self.start + first
        return replace(self, start=start, end=start + bases)


@dataclass(frozen=True)
class Example:
    """One labelled sequence."""

    name: str
    """As its file calls it, or the number of its row."""
    held: bytes | Cut
    """Its bases, or where in a genome they are."""
    label: str
    """As it stands in the file."""
    where: str
    """File and line or row, for messages."""
    split: str = ""
    """train, valid or test, where the file says it."""
    chromosome: str = ""
    """Of an interval."""
    values: Values | None = None
    """The labels of its places, where they are numbers."""

    @property
    def bases(self) -> bytes:
        """IUPAC codes in either case, as in the file, with T for RNA's U. Those of an interval are cut out anew each
        time."""
        return self.held if isinstance(self.held, bytes) else self.held.bases

    @property
    def length(self) -> int:
        """How many bases."""
        return len(self.held) if isinstance(self.held, bytes) else self.held.end - self.held.start

    @cached_property
    def key(self) -> bytes:
        """The same of two sequences that differ in the case of letters only, and of no others."""
        return _key(self.bases)

    @cached_property
    def key_of_either_strand(self) -> bytes:
        """The same of a sequence and its reverse complement, too."""
        return min(self.key, _key(reverse_complement(self.bases)))

    def part(self, first: int, bases: int) -> "Example":
        """The same with so many of its bases, from one on."""
        held = self.held[first : first + bases] if isinstance(self.held, bytes) else self.held.part(first, bases)
        return replace(self, held=held)


@dataclass(frozen=True)
class Columns:
    """Where in a table things stand."""

    sequence: str = "sequence"
    label: str = "label"
    split: str | None = None
    """None: that called split, where there is one."""
    places: str = ""
    """The task whose labels belong to places of the sequence: texts of a letter for each base, numbers, or .npy files;
    "": they belong to whole sequences."""


def _key(bases: bytes) -> bytes:
    return blake2b(bases.upper(), digest_size=16).digest()


def reverse_complement(bases: bytes) -> bytes:
    """The other strand of a sequence, read from its end."""
    return bases.translate(_COMPLEMENT)[::-1]


def read_table(path: Path, columns: Columns, genome: Path | None = None) -> list[Example]:
    """Every labelled sequence of a file, in order.

    Args:
        genome: FASTA that intervals are cut out of; given, the file is one of intervals.

    Raises:
        DataError: the file is damaged, of another kind, or holds something that is no labelled sequence.
    """
    start, _ = start_of(path, empty_is="the file is empty; give a file of labelled sequences")
    array = beside(path) if columns.places and beside(path).is_file() else None
    if array is not None:
        columns = replace(columns, label="")
    if genome is not None:
        found = _intervals(path, genome, columns)
    elif start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b">"):
        found = list(_fasta(path))
    else:
        rows = rows_of(path, lambda header: _check_header(path, header, columns), kept=columns.label)
        found = [_example(values, columns, where, number, path) for number, (where, values) in enumerate(rows)]
    if not found:
        raise DataError(f"{path}: holds no labelled sequences; give a file with at least one row")
    return found if array is None else _with_rows(found, array, path)


def _with_rows(examples: list[Example], path: Path, table: Path) -> list[Example]:
    """Each sequence with its row of the array beside the table."""
    array = open_array(path)
    if array.ndim < 2 or len(array) != len(examples):
        raise DataError(f"{path}: is an array of {list(array.shape)}, and {table} has {len(examples):,} rows: each "
                        "needs a row of labels in it")
    return [replace(example, values=Values(row, f"{path}: row {number + 1}"))
            for number, (example, row) in enumerate(zip(examples, array, strict=True))]


def _example(values: Mapping[str, Any], columns: Columns, where: str, number: int, table: Path) -> Example:
    """The labelled sequence of a row.

    Raises:
        DataError: its sequence, label or split cannot be used.
    """
    bases = as_dna(sequence(values[columns.sequence].strip().encode(), where)).tobytes()
    word = values[columns.split] if columns.split else values.get("split")
    split = "" if word is None else _split(word, where)
    name = values.get("name") or values.get("id") or str(number)
    label = values[columns.label] if columns.label else ""
    if columns.places and isinstance(label, list):
        return Example(name, bases, "", where, split, values=_numbers(label, where))
    return _labelled(Example(name, bases, _text(label).strip(), where, split), columns, table)


def _labelled(example: Example, columns: Columns, table: Path) -> Example:
    """With the numbers that its label is or names.

    Raises:
        DataError: it has no label.
    """
    if not columns.label:  # the labels are in a file beside the table
        return example
    if not example.label:
        raise DataError(f"{example.where}: has no label in column {columns.label!r}; write one, or remove the row")
    if not columns.places:
        return example
    return replace(example, values=written(example.label, table, example.where, per_base=columns.places == "per_base"))


def _split(word: str, where: str) -> str:
    if (found := SPLITS.get(word.strip().lower())) is None:
        raise DataError(f"{where}: the split {word!r} is not known; write train, valid (or val, dev) or test, or "
                        "rename the column if it is of something else")
    return found


def _is_empty(line: str) -> bool:
    return not line.strip()


def _rows(path: Path, is_no_row: Callable[[str], bool] = _is_empty) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a text table. It is separated by tabs where its first row has one, else by
    commas, else by blanks.

    Args:
        is_no_row: whether a line is passed over.
    """
    begin: list[str] = []
    lines = ("" if is_no_row(line) else line for line in _texts(path))
    for line in lines:
        begin.append(line)
        if line:
            break
    row = begin[-1] if begin else ""
    csv.field_size_limit(1 << 31)
    reader = csv.reader((line + "\n" for line in chain(begin, lines)), strict=True, skipinitialspace=True,
                        delimiter=next((mark for mark in "\t," if mark in row), " "))
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: is no row of a table ({error}); write it anew") from None
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield reader.line_num, fields


def _texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(lines_of(path, no_report), 1):
        try:
            yield line.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: line {number}: is not text of UTF-8 ({error.reason}); save it as UTF-8") from None


def rows_of(path: Path, check: Callable[[list[str]], None], *, kept: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Place, for messages, and text by column of each row of a CSV, TSV or parquet table.

    Args:
        check: gets the names in the header before any row is read, and raises where they will not do.
        kept: a column of parquet whose lists stay lists.

    Raises:
        DataError: the table is damaged, or a row has another number of fields than the header.
    """
    start, packed = start_of(path, empty_is="the file is empty; give a table with a header")
    if start.startswith(b"PAR1"):
        yield from _parquet(path, check, kept)
        return
    refuse_kinds(path, start.removeprefix(b"\xef\xbb\xbf"), packed=packed, text="converted.csv")
    rows = _rows(path)
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    check(header)
    for line, fields in rows:
        where = f"{path}: line {line}"
        if len(fields) != len(header):
            raise DataError(f"{where}: has {len(fields)} columns and the header has {len(header)}; the file is cut "
                            f"short or the row must be mended")
        yield where, dict(zip(header, fields, strict=True))


def _check_header(path: Path, header: list[str], columns: Columns) -> None:
    wanted = [name for name in (columns.sequence, columns.label, columns.split) if name]
    keys = {columns.sequence: "sequence", columns.label: "label", columns.split or "": "split"}
    for name in wanted:
        if header.count(name) != 1:
            how = "twice" if name in header else "not"
            raise DataError(f"{path}: line 1: the column {name!r} is {how} in the header {', '.join(header)[:200]!r}; "
                            f"name the right one with finetune.{keys[name]}_column")


def _parquet(path: Path, check: Callable[[list[str]], None], kept: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: is parquet, which is read with pyarrow; install it with "
                        f"pip install 'hyena-dist[tables]'") from None
    with said_in_one_line(path), open_regular(path) as raw:
        try:
            table = parquet.ParquetFile(raw)
            check(table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {key: value if key == kept and isinstance(value, list)
                                                    else _text(value) for key, value in row.items()}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is damaged ({one_line(error)}); copy or download it again") from None


def _numbers(value: list[Any], where: str) -> Values:
    """A cell of parquet that is a list, or a list of lists, of numbers."""
    try:
        array = np.array(value)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: its labels are no list of numbers, or lists of different lengths; write numbers, "
                        "NaN where none is known")
    return Values(array, where)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ";".join(map(_text, value)) or NO_LABEL
    return str(value)


def _fasta(path: Path) -> Iterator[Example]:
    """The label is what stands behind the last `|` of a header, which the reader of genomes cuts at its first blank."""
    header, line_of_header = "", 0
    pieces: list[bytes] = []
    for number, line in enumerate(lines_of(path), 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.startswith(b">"):
            if header:
                yield _of_fasta(path, header, b"".join(pieces), line_of_header)
            header, pieces, line_of_header = line[1:].decode("utf-8", "replace").strip(), [], number
            if not header:
                raise DataError(f"{path}: line {number}: a header without a name; write '>name|label'")
        elif line.strip():
            pieces.append(line.strip())
    if header:
        yield _of_fasta(path, header, b"".join(pieces), line_of_header)


def _of_fasta(path: Path, header: str, bases: bytes, line: int) -> Example:
    where = f"{path}: line {line}"
    name, bar, label = header.rpartition("|")
    if not bar or not label.strip():
        raise DataError(f"{where}: the header {header[:80]!r} has no label; write it behind a last '|', as in "
                        "'>name|label'")
    return Example(name.strip(), as_dna(sequence(bases, where)).tobytes(), label.strip(), where)


def _intervals(path: Path, genome: Path, columns: Columns) -> list[Example]:
    """Those of a table of intervals, starts counted from 0, with bases of a genome."""
    rows = list(intervals_in(path, _rows(path, is_no_row), columns.label, columns.split))
    wanted = {row.contig for row in rows}
    # The others are not kept: a genome is large.
    contigs: dict[str, bytes] = {}
    others: list[str] = []
    for contig in read_contigs([Source(genome)]):
        if contig.name in wanted:
            contigs[contig.name] = as_dna(contig.bases).tobytes()
        elif len(others) < 3:
            others.append(contig.name)
    for row in rows:
        if row.contig not in contigs:
            raise DataError(f"{row.where}: contig {row.contig!r} is not in {genome}, which has "
                            f"{', '.join([*contigs, *others][:3])}: check the names (chr1 or 1?)")
    return [_labelled(_cut(contigs, row, genome), columns, path) for row in rows]


def _cut(contigs: Mapping[str, bytes], row: Interval, genome: Path) -> Example:
    contig, start, end, strand, label, split, where = row
    if end > len(contigs[contig]):
        raise DataError(f"{where}: {contig}:{start}-{end} reaches past the {len(contigs[contig]):,} bases of its "
                        f"contig in {genome}; is it of another assembly?")
    name = f"{contig}:{start}-{end}" + ("(-)" if strand == "-" else "")
    return Example(name, Cut(contigs[contig], start, end, strand == "-"), label, where,
                   "" if split is None else _split(split, where), contig)
