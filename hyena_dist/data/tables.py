"""Labelled sequences of a file: CSV, TSV and parquet with a header, FASTA with labels in its headers, intervals with a
genome. What a file is, its content says; any but parquet may be packed by gzip.

Nothing is mended in silence: a sequence with a letter that no sequence has, a row without a label or with too few
columns, and an interval outside its contig are refused with the place where they stand.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import one_line
from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import lines_of, no_report, said_in_one_line, start_of
from hyena_dist.data.blocks import refuse_other_kinds as refuse_kinds
from hyena_dist.data.contigs import Source, sequence
from hyena_dist.data.errors import DataError
from hyena_dist.data.sources import read_contigs

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
"""The words that people write for a split, in lower case, and what they mean here."""
_CHROMOSOME = frozenset({"chrom", "chromosome", "chr", "#chrom", "#chr", "region"})
"""First words of a header of intervals."""
_COMPLEMENT = bytes.maketrans(b"ACGTURYSWKMBDHVNacgturyswkmbdhvn", b"TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


@dataclass(frozen=True)
class Example:
    """One labelled sequence."""

    name: str
    """As its file calls it, or the number of its row."""
    bases: bytes
    """IUPAC codes in either case, as in the file."""
    label: str
    """As it stands in the file."""
    where: str
    """File and line or row, for messages."""
    split: str = ""
    """train, valid or test, where the file says it."""
    chromosome: str = ""
    """Of an interval."""


@dataclass(frozen=True)
class Columns:
    """Where in a table things stand."""

    sequence: str = "sequence"
    label: str = "label"
    split: str | None = None


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
    if genome is not None:
        found = _intervals(path, genome, columns)
    elif start.lstrip().startswith(b">"):
        found = list(_fasta(path))
    else:
        rows = rows_of(path, lambda header: _check_header(path, header, columns))
        found = [_example(values, columns, where, number) for number, (where, values) in enumerate(rows)]
    if not found:
        raise DataError(f"{path}: holds no labelled sequences; give a file with at least one row")
    return found


def _example(values: Mapping[str, str], columns: Columns, where: str, number: int) -> Example:
    """The labelled sequence of a row.

    Raises:
        DataError: its sequence, label or split cannot be used.
    """
    bases = sequence(values[columns.sequence].strip().encode(), where).tobytes()
    label = values[columns.label].strip()
    if not label:
        raise DataError(f"{where}: has no label in column {columns.label!r}; write one, or remove the row")
    split = _split(values[columns.split], where) if columns.split else ""
    return Example(values.get("name") or values.get("id") or str(number), bases, label, where, split)


def _split(word: str, where: str) -> str:
    if (found := SPLITS.get(word.strip().lower())) is None:
        raise DataError(f"{where}: the split {word!r} is not known; write train, valid (or val, dev) or test")
    return found


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a text table that is not empty. It is separated by tabs where its first
    line has one, else by commas."""
    def texts() -> Iterator[str]:
        for number, line in enumerate(lines_of(path, no_report), 1):
            try:
                text = line.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number}: is not text of UTF-8 ({error.reason}); save it as UTF-8") \
                    from None
            yield text

    lines = texts()
    first = next(lines, "")
    csv.field_size_limit(1 << 31)
    reader = csv.reader(_chain(first, lines), delimiter="\t" if "\t" in first else ",", strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: is no row of a table ({error}); write it anew") from None
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield reader.line_num, fields


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first + "\n"
    yield from (line + "\n" for line in rest)


def rows_of(path: Path, check: Callable[[list[str]], None]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place, for messages, and text by column of each row of a CSV, TSV or parquet table.

    Args:
        check: gets the names in the header before any row is read, and raises where they will not do.

    Raises:
        DataError: the table is damaged, or a row has another number of fields than the header.
    """
    start, packed = start_of(path, empty_is="the file is empty; give a table with a header")
    if start.startswith(b"PAR1"):
        yield from _parquet(path, check)
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


def _parquet(path: Path, check: Callable[[list[str]], None]) -> Iterator[tuple[str, dict[str, str]]]:
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
                    yield f"{path}: row {number}", {key: _text(value) for key, value in row.items()}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is damaged ({one_line(error)}); copy or download it again") from None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ";".join(map(_text, value)) if isinstance(value, list) else str(value)


def _fasta(path: Path) -> Iterator[Example]:
    """The label is what stands behind the last `|` of a header, which the reader of genomes cuts at its first blank."""
    header, line_of_header = "", 0
    pieces: list[bytes] = []
    for number, line in enumerate(lines_of(path), 1):
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
    return Example(name.strip(), sequence(bases, where).tobytes(), label.strip(), where)


@dataclass(frozen=True)
class _Places:
    """Number of each column of a table of intervals."""

    label: int = 3
    strand: int | None = None
    split: int | None = None


def _intervals(path: Path, genome: Path, columns: Columns) -> list[Example]:
    """Rows of contig, start (counted from 0), end (behind the last base), label, and if wanted strand and split."""
    contigs = {contig.name: contig.bases.tobytes() for contig in read_contigs([Source(genome)])}
    found: list[Example] = []
    places = _Places()
    for number, (line, fields) in enumerate(_rows(path)):
        where = f"{path}: line {line}"
        fields = [field.strip() for field in fields]
        if number == 0 and fields[0].lower() in _CHROMOSOME:
            places = _places(path, fields, columns)
            continue
        if fields[0].startswith("#"):
            continue
        wanted = max(filter(None, (2, places.label, places.strand, places.split))) + 1
        if len(fields) < wanted:
            raise DataError(f"{where}: has {len(fields)} columns; write contig, start, end, label"
                            f"{', strand' * (wanted > 4)}, separated by tabs")
        if number == 0 or (places == _Places() and not found):
            places = _Places(strand=4 if len(fields) > 4 and fields[4] in "+-." else None)
        found.append(_cut(contigs, fields, places, where, genome))
    return found


def _places(path: Path, header: list[str], columns: Columns) -> _Places:
    if columns.label not in header:
        raise DataError(f"{path}: line 1: the column {columns.label!r} is not in the header "
                        f"{', '.join(header)[:200]!r}; name the right one with finetune.label_column")
    split = columns.split or ("split" if "split" in header else None)
    if split is not None and split not in header:
        raise DataError(f"{path}: line 1: the column {split!r} is not in the header {', '.join(header)[:200]!r}; name "
                        f"the right one with finetune.split_column")
    return _Places(header.index(columns.label), header.index("strand") if "strand" in header else None,
                   header.index(split) if split else None)


def _cut(contigs: Mapping[str, bytes], fields: list[str], places: _Places, where: str, genome: Path) -> Example:
    """The interval of a row."""
    contig, start, end = fields[:3]
    if contig not in contigs:
        raise DataError(f"{where}: contig {contig!r} is not in {genome}; check the names (chr1 or 1?)")
    if not (re.fullmatch("[0-9]{1,18}", start) and re.fullmatch("[0-9]{1,18}", end) and int(start) < int(end)):
        raise DataError(f"{where}: start {start!r} and end {end!r} must be whole numbers, start < end")
    if int(end) > len(contigs[contig]):
        raise DataError(f"{where}: {contig}:{start}-{end} reaches past the {len(contigs[contig]):,} bases of its "
                        f"contig in {genome}; is it of another assembly?")
    label = fields[places.label]
    if not label:
        raise DataError(f"{where}: has no label; write one, or remove the row")
    strand = "+" if places.strand is None else fields[places.strand]
    if strand not in ("+", "-", "."):
        raise DataError(f"{where}: strand {strand!r} must be +, - or .")
    bases = contigs[contig][int(start) : int(end)]
    split = "" if places.split is None else _split(fields[places.split], where)
    name = f"{contig}:{start}-{end}" + ("(-)" if strand == "-" else "")
    return Example(name, reverse_complement(bases) if strand == "-" else bases, label, where, split, contig)
