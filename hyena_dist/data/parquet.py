"""Parquet files, as of Hugging Face: a sequence in each row, in the columns that are keys of JSON lines."""

from collections.abc import Iterator
from typing import Any

from hyena_dist.config.errors import one_line
from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import OnBytes, said_in_one_line
from hyena_dist.data.contigs import Contig, Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.jsonl import NAME_KEYS, TEXT_KEYS, named

_ROWS = 16
"""Held at a time; one may be a chromosome."""


def contigs(source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
    """The rows of a parquet file; see `contigs.Reader`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{source.path}: is parquet, which is read with pyarrow; install it with "
                        f"pip install 'hyena-dist[tables]'") from None
    with said_in_one_line(source.path), open_regular(source.path) as raw:
        try:
            table = parquet.ParquetFile(raw)
            columns = [name for name in table.schema_arrow.names if name in TEXT_KEYS + NAME_KEYS]
            if not set(columns) & set(TEXT_KEYS):
                raise DataError(f"{source.path}: has the columns {', '.join(table.schema_arrow.names)[:200]}; name the "
                                f"one of the sequence {' or '.join(map(repr, TEXT_KEYS))}")
            yield from _rows(source, table, columns, raw.seek(0, 2), on_bytes)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what was read
                raise
            raise DataError(f"{source.path}: is damaged ({one_line(error)}); copy or download it again") from None


def _rows(source: Source, table: Any, columns: list[str], size: int, on_bytes: OnBytes) -> Iterator[Contig]:
    total, number, reported = table.metadata.num_rows, 0, 0
    if not total:
        raise DataError(f"{source.path}: holds no rows; give a file that holds sequence")
    for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield named(source, row, number, f"{source.path}: row {number}")
        on_bytes(size * number // total - reported)
        reported = size * number // total
