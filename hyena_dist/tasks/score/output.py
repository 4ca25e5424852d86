"""Files of scores: TSV, parquet, and a VCF with the scores in INFO. Each says in its header how it was made."""

import gzip
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.variants import Judged, Variants, window_of
from hyena_dist.tasks.columns import MARK, marked, need_pyarrow, text_of
from hyena_dist.tasks.score.observe import SCORES

_ROWS = 4096
"""Written at a time."""

OWN = ("chrom", "pos", "ref", "alt", "outcome", "notes", *SCORES, "len_diff", "window", "window_cut")
"""Columns of a file of scores, before those that are carried over from the file of variants."""


class Scored(NamedTuple):
    """A row of the file, with its scores where it has any."""

    judged: Judged
    scores: np.ndarray | None
    """float64 [SCORES]."""


def check_ending(path: Path, variants: Variants) -> None:
    """Raises ConfigError: a file of this name cannot be written of these variants."""
    ending = next((ending for ending in WRITERS if path.name.endswith(ending)), None)
    if ending is None:
        raise ConfigError(f"--out {path}: name a file that ends in {', '.join(WRITERS)}")
    if ending.startswith(".vcf") and not variants.is_vcf:
        raise ConfigError(f"--out {path}: a VCF is written of a VCF alone: name a .tsv or .parquet")
    if ending == ".parquet":
        need_pyarrow("--out", path)
    if ending == ".vcf.gz" and find_spec("pysam") is None:
        raise ConfigError(f"--out {path}: bgzip is written with pysam; install it with pip install "
                          "'hyena-dist[tables]', or name a .vcf")


def left_out(out: Path, variants: Variants) -> dict[str, str]:
    """For the header of a VCF: which lines of the file of variants are not in it."""
    count = variants.lines_without_record() if out.name.endswith((".vcf", ".vcf.gz")) else 0
    said = f"{count} lines with fewer columns than the header, or without a number for POS"
    return {"left_out": said} if count else {}


def write(path: Path, name: str, rows: Iterable[Scored], variants: Variants, facts: Mapping[str, Any],
          window: int) -> None:
    """Write a file of scores.

    Args:
        name: by whose ending the format is chosen.
        facts: of the header.
        window: bases of a window that nothing cuts.

    Raises:
        OSError: it cannot be written.
    """
    writer = next(write for ending, write in WRITERS.items() if name.endswith(ending))
    writer(path, rows, variants, marked(facts), window)


def _values(row: Scored, window: int) -> list[Any]:
    """Of the columns `OWN`; None where there is none."""
    judged = row.judged
    found: list[Any] = [judged.row.chrom, judged.row.pos, judged.row.ref, judged.row.alt, judged.outcome,
                        ",".join(judged.notes)]
    site = judged.repeated if judged.site is None else judged.site
    if site is None or row.scores is None:
        return [*found, *[None] * (len(OWN) - len(found))]
    scores = [value if math.isfinite(value) else None for value in row.scores.tolist()]
    length = window_of(site, window)[1]
    return [*found, *scores, site.alt.size - site.removed, length, int(length < window)]


def column_names(wanted: Iterable[str], taken: Iterable[str], prefix: str = "given_") -> list[str]:
    """Names of further columns of a file, none of which is one of those taken or comes twice: to such a one the prefix
    is added."""
    names, known = [], set(taken)
    for name in wanted:
        found = " ".join(name.split()) or "column"
        while found in known:
            found = f"{prefix}{found}"
        names.append(found)
        known.add(found)
    return names


def _tsv(path: Path, rows: Iterable[Scored], variants: Variants, facts: Mapping[str, str], window: int) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"##{key}={value}\n" for key, value in facts.items())
        others = column_names(variants.names, OWN)
        file.write("\t".join([*OWN, *others]) + "\n")
        for row in rows:
            values = [*map(text_of, _values(row, window)), *_carried(row, len(others))]
            file.write("\t".join(" ".join(value.split()) for value in values) + "\n")


def _carried(row: Scored, count: int) -> list[str]:
    values = row.judged.row.others[:count]
    return [*values, *[""] * (count - len(values))]


def _parquet(path: Path, rows: Iterable[Scored], variants: Variants, facts: Mapping[str, str], window: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = {name: pa.string() for name in OWN[:6]}
    types |= {name: pa.float64() for name in SCORES} | {name: pa.int64() for name in OWN[-3:]}
    if all(_PLACE.fullmatch(row.pos) for row in variants):
        types["pos"] = pa.int64()
    carried = _carried_fields(variants)
    schema = pa.schema([*(pa.field(name, types[name]) for name in OWN), *carried], metadata=dict(facts))
    with parquet.ParquetWriter(path, schema) as writer:
        for some, others in _with_carried(iter(rows), variants, len(carried)):
            columns = [list(column) for column in zip(*(_values(row, window) for row in some), strict=True)]
            if types["pos"] == pa.int64():
                columns[1] = [int(pos) for pos in columns[1]]
            own = [pa.array(column, types[name]) for name, column in zip(OWN, columns, strict=True)]
            writer.write_table(pa.table([*own, *others], schema=schema))


def _carried_fields(variants: Variants) -> list[Any]:
    """Name and type of each column of parquet that is carried over: of parquet its own type, else text."""
    import pyarrow as pa

    names, table = column_names(variants.names, OWN), variants.table
    if table is None or not table.is_parquet:
        return [pa.field(name, pa.string()) for name in names]
    schema = table.parquet_schema()
    return [pa.field(name, schema.field(number).type) for name, number in zip(names, table.others, strict=True)]


def _with_carried(rows: Iterator[Scored], variants: Variants, carried: int) -> Iterator[tuple[list[Scored], list[Any]]]:
    """Rows that are written together, and their columns that are carried over, as arrays: those of parquet are read
    anew, for a row has their text alone."""
    import pyarrow as pa

    table = variants.table
    if table is not None and table.is_parquet:
        for batch in filter(len, table.batches()):
            yield list(islice(rows, batch.num_rows)), [batch.column(number) for number in table.others]
        return
    while some := list(islice(rows, _ROWS)):
        values = zip(*(_carried(row, carried) for row in some), strict=True)
        yield some, [pa.array(column, pa.string()) for column in values]


_PLACE = re.compile("[0-9]{1,18}")
_KEYS = frozenset(f"HD_{name}".encode() for name in OWN[4:])
"""Of INFO in a VCF."""
_INFO = re.compile(rb"##INFO=<ID=([^,>]+)")


def _is_of_scores(line: bytes) -> bool:
    """Whether a line of a VCF's header is one that we write: the file may have scores of an earlier call."""
    match = _INFO.match(line)
    return line.startswith(f"##{MARK}".encode()) or (match is not None and match[1] in _KEYS)


def _without_scores(info: bytes) -> bytes:
    """INFO without scores of an earlier call, of which other readers would take the first."""
    if info == b".":
        return b""
    return b";".join(entry for entry in info.split(b";") if entry.partition(b"=")[0] not in _KEYS)


def _vcf_lines(rows: Iterable[Scored], variants: Variants, facts: Mapping[str, str], window: int) -> Iterator[bytes]:
    yield from (line + b"\n" for line in variants.header[:-1] if not _is_of_scores(line))
    for number, name in enumerate(OWN[4:], 4):
        kind = "String" if number < 6 else "Integer" if name in OWN[-3:] else "Float"
        yield f'##INFO=<ID=HD_{name},Number=A,Type={kind},Description="{SCORES.get(name, name)}">\n'.encode()
    yield from (f"##{key}={value}\n".encode() for key, value in facts.items())
    yield variants.header[-1] + b"\n"
    for _, of_line in groupby(rows, key=lambda row: row.judged.row.line):
        group = list(of_line)
        raw = group[0].judged.row.raw
        if not variants.is_record(raw):
            continue
        alleles = [_values(row, window)[4:] for row in group]
        columns = zip(OWN[4:], zip(*alleles, strict=True), strict=True)
        info = ";".join(f"HD_{name}=" + ",".join(text_of(value).replace(",", "&") or "." for value in values)
                        for name, values in columns)
        fields = raw.split(b"\t")
        fields[7] = b";".join(filter(None, (_without_scores(fields[7]), info.encode())))
        yield b"\t".join(fields) + b"\n"


def _vcf(path: Path, rows: Iterable[Scored], variants: Variants, facts: Mapping[str, str], window: int) -> None:
    with path.open("wb") as file:
        file.writelines(_vcf_lines(rows, variants, facts, window))


def _vcf_gz(path: Path, rows: Iterable[Scored], variants: Variants, facts: Mapping[str, str], window: int) -> None:
    """In blocks, which tabix and bcftools index."""
    import pysam

    with pysam.BGZFile(str(path), "wb", index=None) as file:
        for line in _vcf_lines(rows, variants, facts, window):
            file.write(line)


WRITERS: dict[str, Callable[[Path, Iterable[Scored], Variants, Mapping[str, str], int], None]] = {
    ".tsv": _tsv, ".parquet": _parquet, ".vcf": _vcf, ".vcf.gz": _vcf_gz}
"""By the ending of the file's name."""


class Table(NamedTuple):
    """A file of scores, read."""

    facts: dict[str, str]
    """Of its header, without `MARK`."""
    names: list[str]
    rows: list[list[str]]
    where: str = "the file"
    """Its name, for messages."""


def read_scores(path: Path) -> Table:
    """A .tsv or .parquet of scores.

    Raises:
        ConfigError: it is none.
    """
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_tsv(path)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({said}): give a file that score.py variants wrote") from error
    if "outcome" not in table.names:
        raise ConfigError(f"{path}: is no .tsv or .parquet of scores: give one that score.py variants wrote")
    return table._replace(where=str(path))


def _read_tsv(path: Path) -> Table:
    facts: dict[str, str] = {}
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        names: list[str] = []
        rows = []
        for line in file:
            text = line.rstrip("\n")
            if text.startswith(f"##{MARK}"):
                key, _, value = text.removeprefix(f"##{MARK}").partition("=")
                facts[key] = value
            elif not names:
                names = text.split("\t")
            else:
                rows.append(text.split("\t"))
    return Table(facts, names, rows)


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"{path}: is read with pyarrow; install it with pip install 'hyena-dist[tables]'") from None
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise OSError(str(error)) from error
    facts = {key.decode().removeprefix(MARK): value.decode() for key, value in (table.schema.metadata or {}).items()
             if key.decode().startswith(MARK)}
    columns = [[text_of(value) for value in column.to_pylist()] for column in table.columns]
    return Table(facts, table.column_names, [list(row) for row in zip(*columns, strict=True)])
