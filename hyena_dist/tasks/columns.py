"""Files of columns, .tsv and .parquet, whose header says how they were made."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError

MARK = "hyena_dist."
"""Before every key of a header."""
ENDINGS = (".tsv", ".parquet")

Columns = dict[str, Any]
"""Of some rows: numbers in a numpy array [n], or [n, D] for a vector in each row, texts in a list."""


def check_ending(option: str, path: Path, endings: Iterable[str] = ENDINGS) -> None:
    """Raises ConfigError: a file of this name cannot be written here."""
    if path.suffix not in endings:
        raise ConfigError(f"{option} {path}: name a file that ends in {' or '.join(endings)}")
    if path.suffix == ".parquet":
        need_pyarrow(option, path)


def need_pyarrow(option: str, path: Path) -> None:
    """Raises ConfigError: parquet cannot be written."""
    try:
        import pyarrow  # noqa: F401 - whether it is there
    except ImportError:
        raise ConfigError(f"{option} {path}: parquet is written with pyarrow; install it with pip install "
                          "'hyena-dist[tables]', or name another kind of file") from None


def marked(facts: Mapping[str, Any]) -> dict[str, str]:
    """A header's keys and values as they stand in a file."""
    return {f"{MARK}{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def text_of(value: Any) -> str:
    """Of a number nine digits, which give float32 back; nothing of None, and of a float that is no number."""
    if isinstance(value, float):
        return f"{value:.9g}" if value == value else ""
    return "" if value is None else str(value)


def write_columns(path: Path, ending: str, facts: Mapping[str, Any], groups: Iterable[Columns]) -> None:
    """Write groups of rows, one after the other; each has the same columns.

    Args:
        ending: of ENDINGS; `path` may be a temporary name.
        facts: of the header.
    """
    header = marked(facts)
    if ending == ".parquet":
        _parquet(path, header, groups)
        return
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"##{key}={value}\n" for key, value in header.items())
        for number, columns in enumerate(groups):
            if number == 0:
                file.write("\t".join(columns) + "\n")
            file.writelines(_lines(columns))


def _lines(columns: Columns) -> Iterator[str]:
    for row in zip(*(values.tolist() if isinstance(values, np.ndarray) else values for values in columns.values()),
                   strict=True):
        yield "\t".join(map(text_of, row)) + "\n"


def _parquet(path: Path, header: Mapping[str, str], groups: Iterable[Columns]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for columns in groups:
            arrays = [_array(pa, values) for values in columns.values()]
            table = pa.table(arrays, names=list(columns)).replace_schema_metadata(dict(header))
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _array(pa: Any, values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values, from_pandas=True) if isinstance(values, np.ndarray) else pa.array(values, pa.string())
