"""The tables of a task, a row at a time: train, dev and test as CSV, and their labels beside them as .npy where these
are numbers of bins or of pairs of bins."""

import csv
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example

FILES = {"train": "train.csv", "valid": "dev.csv", "test": "test.csv"}


class Writer:
    """Writes into a directory that is there; a context that closes its files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tables: dict[str, TextIO] = {}
        self._arrays: dict[str, _Array] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for table in self._tables.values():
            table.close()
        for array in self._arrays.values():
            array.close()

    def write(self, example: Example, bases: bytes) -> None:
        """Add a sequence to its split.

        Raises:
            DataError: it has numbers of another shape than those before it.
        """
        table = self._tables.get(example.split)
        path = self._directory / FILES[example.split]
        if table is None:
            # A sequence may be called as its file is, whose name need not be text.
            table = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            self._tables[example.split] = table
            table.write("sequence,label,name\n")
        csv.writer(table, lineterminator="\n").writerow((bases.decode("ascii"), example.label, example.name))
        if example.values is not None:
            values = example.values.array()
            array = self._arrays.get(example.split)
            if array is None:
                array = self._arrays[example.split] = _Array(path.with_suffix(".npy"), values)
            array.add(values, example.where)


class _Array:
    """An .npy file whose number of rows is known when it is closed: numpy leaves room for that in the header."""

    def __init__(self, path: Path, first: np.ndarray) -> None:
        self._shape, self._dtype, self._rows = first.shape, first.dtype, 0
        self._file: BinaryIO = path.open("wb")
        self._file.write(self._header())

    def _header(self) -> bytes:
        said = BytesIO()
        np.lib.format.write_array_header_1_0(said, {
            "descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
            "shape": (self._rows, *self._shape)})
        return said.getvalue()

    def add(self, row: np.ndarray, where: str) -> None:
        if row.shape != self._shape:
            raise DataError(f"{where}: has labels of the shape {list(row.shape)}, and sequences before it of "
                            f"{list(self._shape)}: copy or download the file again")
        self._file.write(np.ascontiguousarray(row, dtype=self._dtype).tobytes())
        self._rows += 1

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()


def thin(directory: Path, most: int) -> str:
    """Keep so many rows of the training sequences, in their order; says of how many."""
    path = directory / FILES["train"]
    csv.field_size_limit(1 << 31)
    with path.open(encoding="utf-8", newline="") as table:
        header, *rows = csv.reader(table)
    kept = np.sort(np.random.default_rng(0).choice(len(rows), size=most, replace=False))
    with path.open("w", encoding="utf-8", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows([header, *(rows[row] for row in kept.tolist())])
    array = path.with_suffix(".npy")
    if array.exists():
        chosen = np.load(array, mmap_mode="r")[kept]
        np.save(array, chosen)
    return f"{most:,} of {len(rows):,} training sequences were drawn at random, and only these are used"
