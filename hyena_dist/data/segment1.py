"""Segments of format 1, which are still read: no checksums, and the runs of the whole segment behind its bases.

    4 bytes   magic
    4 bytes   number of bases n
    4 bytes   size of the code runs
    n/4       2 bits a base
    ...       code runs, case runs
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from hyena_dist.data import segment
from hyena_dist.data.errors import DataError

MAGIC = b"HDS1"
_HEAD = struct.Struct("<4sII")


def _read_head(head: bytes) -> tuple[int, int]:
    """Number of bases and size of the code runs."""
    if len(head) < _HEAD.size or head[:4] != MAGIC:
        raise DataError("does not start as a segment")
    return _HEAD.unpack_from(head)[1:]


class PlainLayout(NamedTuple):
    """The head of a segment, and its runs."""

    bases: int
    codes: segment.CodeRuns
    soft: segment.SoftRuns

    @classmethod
    def read(cls, place: segment.Place, bases: int) -> "PlainLayout":
        """Of a segment that the index says has this many bases. Raises DataError: it is another, or damaged."""
        size, code_bytes = _read_head(place.read(0, _HEAD.size))
        if size != bases:
            raise DataError(f"has {size:,} bases, not {bases:,}")
        try:
            codes_at = _HEAD.size + segment.packed_bytes(size)
            codes = segment.decode_codes(place.read(codes_at, code_bytes), size)
            case_at = codes_at + code_bytes
            soft = segment.decode_soft(place.read(case_at, place.nbytes - case_at), size)
        except (zlib.error, ValueError) as error:
            raise DataError(f"holds damaged runs ({error})") from None
        return cls(size, codes, soft)

    def fill(self, file: int, offset: int, start: int, ids: np.ndarray, soft: bool = False) -> None:
        first = start // 4
        at, count = _HEAD.size + first, segment.packed_bytes(start + ids.size) - first
        packed = segment.Place(file, offset, at + count).read(at, count)
        segment.unpack_ids(packed, start - 4 * first, ids)
        segment.put_codes(self.codes, start, ids)
        if soft:
            segment.put_soft(self.soft, start, ids)


def decode(data: bytes) -> np.ndarray:
    """The ASCII bases of a segment. Raises DataError: it is cut short or its runs are damaged."""
    size, code_bytes = _read_head(data)
    codes_at = _HEAD.size + segment.packed_bytes(size)
    if len(data) < codes_at + code_bytes:
        raise DataError("is cut short")
    return segment.decode_parts(size, data[_HEAD.size : codes_at], data[codes_at : codes_at + code_bytes],
                                data[codes_at + code_bytes :])
