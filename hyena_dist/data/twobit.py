"""UCSC's 2bit files: four bases to a byte, with the stretches of N and of lower case beside them.

    header   magic 0x1A412743, version 0 (or 1, whose offsets have 8 bytes), number of sequences, 0
    index    for each sequence: length of the name in a byte, name, offset
    record   bases; number of N blocks, their starts, their sizes; the same of mask blocks (lower case); 0; the bases at
             two bits each, T 0, C 1, A 2, G 3, the first in the highest bits

All numbers have four bytes, of either order. The format knows N but no other IUPAC code.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import OnBytes, said_in_one_line
from hyena_dist.data.contigs import Contig, Source, full_name
from hyena_dist.data.errors import DataError

MAGIC = struct.pack("<I", 0x1A412743)
_LETTERS = np.frombuffer(b"TCAG", np.uint8)[np.arange(256)[:, None] >> np.array([6, 4, 2, 0]) & 3]
"""[256, 4] the four letters of a byte."""


class _File:
    """An open file; what is not in it is refused before it is read."""

    def __init__(self, source: Source, raw: BinaryIO):
        self.source, self.raw = source, raw
        self.size = os.fstat(raw.fileno()).st_size
        self.order = "<" if self.take(4) == MAGIC else ">"

    def refuse(self, why: str) -> DataError:
        """The error that says what is wrong with the file."""
        return DataError(f"{self.source.path}: {why}; copy or download it again")

    def take(self, size: int) -> bytes:
        """The next bytes, all of them."""
        if size > self.size - self.raw.tell():
            raise self.refuse(f"the 2bit file is cut short at byte {self.size:,}")
        return self.raw.read(size)

    def numbers(self, count: int, kind: str = "u4") -> np.ndarray:
        """The next numbers, int64."""
        dtype = np.dtype(self.order + kind)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).astype(np.int64)

    def index(self) -> list[tuple[bytes, int]]:
        """Names and offsets."""
        version, count, reserved = self.numbers(3).tolist()
        if version not in (0, 1) or reserved:
            raise self.refuse(f"its header says version {version}, of which this code reads 0 and 1")
        if not count:
            raise self.refuse("holds no sequence")
        found = []
        for _ in range(count):  # ends at the end of the file at the latest
            (length,) = self.take(1)
            name = self.take(length)
            found.append((name, int(self.numbers(1, "u8" if version else "u4")[0])))
        return found

    def spans(self, bases: int, what: str) -> Iterator[tuple[int, int]]:
        """The next table of blocks: starts and ends, in order and inside the sequence."""
        (count,) = self.numbers(1)
        starts, sizes = self.numbers(int(count)), self.numbers(int(count))
        ends = starts + sizes
        if (sizes < 1).any() or (starts[1:] < ends[:-1]).any() or (ends > bases).any():
            raise self.refuse(f"{what} overlap or leave their sequence of {bases:,} bases")
        return zip(starts.tolist(), ends.tolist(), strict=True)

    def sequence(self, name: bytes, offset: int) -> np.ndarray:
        """The letters of a sequence, uint8 [bases]."""
        shown = repr(name.decode("utf-8", "replace"))
        if not 0 <= offset <= self.size:
            raise self.refuse(f"sequence {shown} begins at byte {offset:,} of {self.size:,}")
        self.raw.seek(offset)
        bases = int(self.numbers(1)[0])
        if not bases:
            raise self.refuse(f"sequence {shown} has no bases")
        unknown, lower = self.spans(bases, f"N blocks of {shown}"), self.spans(bases, f"mask blocks of {shown}")
        self.numbers(1)
        letters = _LETTERS[np.frombuffer(self.take((bases + 3) // 4), np.uint8)].reshape(-1)[:bases]
        for start, end in unknown:
            letters[start:end] = ord("N")
        for start, end in lower:
            letters[start:end] |= 0x20
        return letters


def contigs(source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
    """The sequences of a 2bit file; see `contigs.Reader`."""
    with said_in_one_line(source.path), open_regular(source.path) as raw:
        file = _File(source, raw)
        index = file.index()
        on_bytes(file.raw.tell())
        for name, offset in index:
            bases = file.sequence(name, offset)
            on_bytes(raw.tell() - offset)
            yield Contig(full_name(source, name, f"{source.path}: sequence at byte {offset:,}"), source, bases)
