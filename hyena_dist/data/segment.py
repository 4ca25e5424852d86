"""The segment codec: bases at 2 bits each, and what 2 bits cannot say as runs beside them. Exact both ways.

    4 bytes   magic
    4 bytes   number of bases n, little-endian
    4 bytes   size of the code runs
    n/4       A 0, C 1, G 2, T 3; four bases to a byte, the first in the lowest bits; 0 where a code run lies
    ...       code runs: stretches of one letter that is not A, C, G or T (start, length, letter)
    ...       case runs: lower-case stretches (start, length)

Runs are stored as 32-bit gaps and lengths, transposed to byte planes and deflated. A reader of tokens needs the packed
bytes around its window and the code runs; case runs are read only where the exact bytes are wanted.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.tokenizer import BYTE_TO_ID

_HEADER = struct.Struct("<4sII")
_MAGIC = b"HDS1"
_LOWER = 0x20
HEADER_BYTES = _HEADER.size
_TWO_BIT = np.zeros(256, dtype=np.uint8)
_TWO_BIT[list(b"ACGTacgt")] = [0, 1, 2, 3] * 2
_IS_CODE = np.ones(256, dtype=bool)
_IS_CODE[list(b"ACGTacgt")] = False


def _unpack_table(letters: np.ndarray) -> np.ndarray:
    """[256] uint32: the four letters of a packed byte, as one word in memory order."""
    packed = np.arange(256)[:, None] >> np.array([0, 2, 4, 6]) & 3
    return np.ascontiguousarray(letters[packed]).view(np.uint32)[:, 0]


_ACGT = np.frombuffer(b"ACGT", dtype=np.uint8)
_TO_BYTES = _unpack_table(_ACGT)
_TO_IDS = _unpack_table(BYTE_TO_ID[_ACGT])


class CodeRuns(NamedTuple):
    """Stretches [start, end) of one letter that is not A, C, G or T, in order."""

    starts: list[int]
    ends: list[int]
    letters: list[int]
    """Upper-case ASCII."""


def _pack_columns(*columns: np.ndarray) -> bytes:
    if not columns[0].size:
        return b""
    words = np.stack(columns).astype("<u4")
    return zlib.compress(np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4).T).tobytes(), 9)


def _unpack_columns(data: bytes, count: int) -> np.ndarray:
    """[count, runs] int64."""
    if not data:
        return np.zeros((count, 0), dtype=np.int64)
    planes = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<u4").reshape(count, -1).astype(np.int64)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the stretches of one value other than 0."""
    framed = np.zeros(values.size + 2, dtype=np.uint8)
    framed[1:-1] = values
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    starts, ends = edges[:-1], edges[1:]
    kept = values[starts] != 0
    return starts[kept], ends[kept]


def _gaps(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Distance of each run from the end of the one before."""
    return starts - np.concatenate(([0], ends))[: starts.size]


def _from_gaps(gaps: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(gaps + lengths)
    return ends - lengths, ends


def encode(bases: np.ndarray) -> bytes:
    """Pack ASCII bases (uint8, IUPAC letters of either case)."""
    fill = np.zeros(-bases.size % 4, dtype=np.uint8)
    quads = np.concatenate((_TWO_BIT[bases], fill)).reshape(-1, 4)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    letters = np.where(_IS_CODE[bases], bases & ~np.uint8(_LOWER), 0).astype(np.uint8)
    starts, ends = _runs(letters)
    codes = _pack_columns(_gaps(starts, ends), ends - starts, letters[starts])
    starts, ends = _runs(bases & _LOWER)
    case = _pack_columns(_gaps(starts, ends), ends - starts)
    return _HEADER.pack(_MAGIC, bases.size, len(codes)) + packed.astype(np.uint8).tobytes() + codes + case


def read_header(data: bytes) -> tuple[int, int]:
    """Number of bases and size of the code runs of a segment that starts with these bytes."""
    if len(data) < HEADER_BYTES or data[:4] != _MAGIC:
        raise DataError("does not start as a segment")
    _, bases, code_bytes = _HEADER.unpack_from(data)
    return bases, code_bytes


def packed_bytes(bases: int) -> int:
    """Size of the 2-bit part of a segment."""
    return (bases + 3) // 4


def decode_codes(data: bytes) -> CodeRuns:
    """Read the code runs of a segment."""
    gaps, lengths, letters = _unpack_columns(data, 3)
    starts, ends = _from_gaps(gaps, lengths)
    return CodeRuns(starts.tolist(), ends.tolist(), letters.tolist())


def unpack_ids(packed: bytes) -> np.ndarray:
    """Token ids of packed bytes, four to a byte, code runs not yet put in."""
    return _TO_IDS.take(np.frombuffer(packed, np.uint8)).view(np.uint8)


def decode(data: bytes) -> np.ndarray:
    """The ASCII bases that `encode` packed."""
    size, code_bytes = read_header(data)
    codes_at = HEADER_BYTES + packed_bytes(size)
    if len(data) < codes_at + code_bytes:
        raise DataError("is cut short")
    bases = _TO_BYTES[np.frombuffer(data[HEADER_BYTES:codes_at], dtype=np.uint8)].view(np.uint8)[:size]
    edges = np.zeros(size + 1, dtype=np.int8)
    try:
        for start, end, letter in zip(*decode_codes(data[codes_at : codes_at + code_bytes]), strict=True):
            bases[start:end] = letter
        starts, ends = _from_gaps(*_unpack_columns(data[codes_at + code_bytes :], 2))
        edges[starts], edges[ends] = 1, -1
    except (zlib.error, ValueError, IndexError) as error:
        raise DataError(f"holds damaged runs ({error})") from None
    return bases | np.cumsum(edges[:-1], dtype=np.uint8) * np.uint8(_LOWER)
