"""The segment codec: bases at 2 bits each, and what 2 bits cannot say as runs beside them. Exact both ways.

    4 bytes   magic
    4 bytes   number of bases n, little-endian as all numbers here
    4 bytes   CRC-32 of magic, n and the table
    12 n / B  table: for each block of B = 16,384 bases its CRC-32, the size of its code runs and of its case runs
    ...       the blocks, one after the other; the last may be shorter

A block stands for itself:

    B/4       A 0, C 1, G 2, T 3; four bases to a byte, the first in the lowest bits; 0 where a code run lies
    ...       code runs: stretches of one letter that is not A, C, G or T (start, length, letter)
    ...       case runs: lower-case stretches (start, length)

Runs are stored as 32-bit gaps and lengths, transposed to byte planes and deflated. The CRC-32 of a block is that of all
its bytes: a reader reads the blocks that its window touches, whole, and checks them before it looks into them. So no
byte of a segment can change unseen, and nothing outside the window is read.

Segments of format 1, which has no checksums, are read too: `segment1`.
"""

import os
import struct
import zlib
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from hyena_dist.data.errors import DataError
from hyena_dist.data.tokenizer import BYTE_TO_ID, SOFT

BLOCK_BASES = 1 << 14
"""A short window reads and checks a whole block for itself: with blocks of 65,536 bases the loader is 0.68 times as
fast at 1,024 tokens as without checksums, with these 0.85 times; they take 0.0007 byte a base more."""
MAGIC = b"HDS2"
_HEAD = struct.Struct("<4sII")
_ROW_BYTES = 12
_LOWER = 0x20
_TWO_BIT = np.zeros(256, dtype=np.uint8)
_TWO_BIT[list(b"ACGTacgt")] = [0, 1, 2, 3] * 2
_IS_CODE = np.ones(256, dtype=bool)
_IS_CODE[list(b"ACGTacgt")] = False
class Place(NamedTuple):
    """Where a segment lies: `nbytes` from `offset` on of an open file."""

    file: int
    offset: int
    nbytes: int

    def read(self, start: int, size: int) -> bytes:
        """Bytes of the segment, at an explicit offset: no file position exists that processes could share.

        Raises:
            DataError: they are not all there.
        """
        data = os.pread(self.file, min(size, self.nbytes - start), self.offset + start) if start < self.nbytes else b""
        if len(data) != size:
            raise DataError(f"it was cut short while in use, {len(data):,} of {size:,} bytes read")
        return data


class Layout(Protocol):
    """Where in a segment its bases are."""

    def fill(self, file: int, offset: int, start: int, ids: np.ndarray, soft: bool = False) -> None:
        """Write the token ids of bases from `start` on into `ids`, to its end.

        Args:
            file, offset: where the segment lies.
            soft: add SOFT to the ids of soft-masked bases.

        Raises:
            DataError: they are damaged.
        """


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


class SoftRuns(NamedTuple):
    """Stretches [start, end) of lower case, in order."""

    starts: list[int]
    ends: list[int]


def _pack_columns(*columns: np.ndarray) -> bytes:
    if not columns[0].size:
        return b""
    words = np.stack(columns).astype("<u4")
    return zlib.compress(np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4).T).tobytes(), 9)


def _unpack_columns(data: bytes, count: int, bases: int) -> np.ndarray:
    """[count, runs] int64; of runs inside this many bases."""
    if not data:
        return np.zeros((count, 0), dtype=np.int64)
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, 4 * count * bases + 1)  # more runs than bases there are not
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("they are cut short or too many")
    planes = np.frombuffer(unpacked, dtype=np.uint8).reshape(4, -1)
    columns = np.ascontiguousarray(planes.T).view("<u4").reshape(count, -1).astype(np.int64)
    gaps, lengths = columns[:2]
    if gaps.size > bases or (lengths < 1).any() or int(gaps.sum() + lengths.sum()) > bases:
        raise ValueError("they leave their block")
    return columns


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


def packed_bytes(bases: int) -> int:
    """Size of the 2-bit part of this many bases."""
    return (bases + 3) // 4


def encode_parts(bases: np.ndarray) -> tuple[bytes, bytes, bytes]:
    """ASCII bases (uint8, IUPAC letters of either case) packed: the 2-bit part, code runs, case runs."""
    fill = np.zeros(-bases.size % 4, dtype=np.uint8)
    quads = np.concatenate((_TWO_BIT[bases], fill)).reshape(-1, 4)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    letters = np.where(_IS_CODE[bases], bases & ~np.uint8(_LOWER), 0).astype(np.uint8)
    starts, ends = _runs(letters)
    codes = _pack_columns(_gaps(starts, ends), ends - starts, letters[starts])
    starts, ends = _runs(bases & _LOWER)
    return packed.astype(np.uint8).tobytes(), codes, _pack_columns(_gaps(starts, ends), ends - starts)


@lru_cache(maxsize=4096)
def decode_codes(data: bytes, bases: int) -> CodeRuns:
    """Read code runs. Few stretches of a genome have any, and those are read again and again."""
    gaps, lengths, letters = _unpack_columns(data, 3, bases)
    if not (letters < 128).all() or not _IS_CODE[letters].all():
        raise ValueError("they are no letters")
    starts, ends = _from_gaps(gaps, lengths)
    return CodeRuns(starts.tolist(), ends.tolist(), letters.tolist())


@lru_cache(maxsize=4096)
def decode_soft(data: bytes, bases: int) -> SoftRuns:
    """Read case runs."""
    starts, ends = _from_gaps(*_unpack_columns(data, 2, bases))
    return SoftRuns(starts.tolist(), ends.tolist())


def unpack_ids(packed: bytes, start: int, ids: np.ndarray) -> None:
    """Write the token ids of packed bases from `start` on into `ids`, code runs not yet put in."""
    skip, size = start & 3, ids.size
    quads = np.frombuffer(packed, np.uint8, (skip + size + 3) >> 2, start >> 2)
    ids[:] = _TO_IDS.take(quads).view(np.uint8)[skip : skip + size]


def put_codes(runs: CodeRuns, start: int, ids: np.ndarray) -> None:
    """Write the ids of the code runs that touch bases from `start` on into `ids`."""
    for i in range(bisect_right(runs.ends, start), bisect_left(runs.starts, start + ids.size)):
        ids[max(runs.starts[i] - start, 0) : runs.ends[i] - start] = BYTE_TO_ID[runs.letters[i]]


def put_soft(runs: SoftRuns, start: int, ids: np.ndarray) -> None:
    """Add SOFT to those ids of bases from `start` on that lie in the runs."""
    for i in range(bisect_right(runs.ends, start), bisect_left(runs.starts, start + ids.size)):
        ids[max(runs.starts[i] - start, 0) : runs.ends[i] - start] |= SOFT


def decode_parts(size: int, packed: bytes, codes: bytes, case: bytes) -> np.ndarray:
    """The `size` ASCII bases that `encode_parts` packed. Raises DataError: the runs are damaged."""
    bases = _TO_BYTES[np.frombuffer(packed, dtype=np.uint8)].view(np.uint8)[:size]
    edges = np.zeros(size + 1, dtype=np.int8)
    try:
        for start, end, letter in zip(*decode_codes(codes, size), strict=True):
            bases[start:end] = letter
        starts, ends = _from_gaps(*_unpack_columns(case, 2, size))
    except (zlib.error, ValueError, IndexError) as error:
        raise DataError(f"holds damaged runs ({error})") from None
    edges[starts] += 1
    edges[ends] -= 1
    return bases | np.cumsum(edges[:-1], dtype=np.uint8) * np.uint8(_LOWER)


class BlockLayout(NamedTuple):
    """The table of a segment, read and checked."""

    bases: int
    checksums: list[int]
    code_bytes: list[int]
    offsets: list[int]
    """Where each block begins, and where the last one ends."""

    @classmethod
    def read(cls, place: Place, bases: int) -> "BlockLayout":
        """Of a segment that the index says has this many bases.

        Raises:
            DataError: it has another number of bases, is no segment, or its table is damaged.
        """
        head_bytes = _HEAD.size + _ROW_BYTES * -(-bases // BLOCK_BASES)
        return cls.parse(place.read(0, min(head_bytes, place.nbytes)), bases, place.nbytes)

    @classmethod
    def parse(cls, head: bytes, bases: int, nbytes: int) -> "BlockLayout":
        """The same from the first bytes of the segment."""
        head_bytes = _HEAD.size + _ROW_BYTES * -(-bases // BLOCK_BASES)
        magic, size, checksum = _HEAD.unpack_from(head) if len(head) >= _HEAD.size else (b"", 0, 0)
        if magic != MAGIC:
            raise DataError("does not start as a segment")
        if size != bases or not bases:
            raise DataError(f"has {size:,} bases, not {bases:,}")
        head = head[:head_bytes]
        if len(head) != head_bytes or zlib.crc32(head[_HEAD.size :], zlib.crc32(head[:8])) != checksum:
            raise DataError("its table of blocks does not match its checksum")
        rows = np.frombuffer(head, "<u4", offset=_HEAD.size).astype(np.int64).reshape(-1, 3)
        sizes = rows[:, 1] + rows[:, 2] + packed_bytes(BLOCK_BASES)
        sizes[-1] += packed_bytes(bases - (len(rows) - 1) * BLOCK_BASES) - packed_bytes(BLOCK_BASES)
        offsets = head_bytes + np.concatenate(([0], np.cumsum(sizes)))
        if offsets[-1] != nbytes:
            raise DataError(f"has {nbytes:,} bytes, its table says {offsets[-1]:,}")
        return cls(bases, rows[:, 0].tolist(), rows[:, 1].tolist(), offsets.tolist())

    def fill(self, file: int, offset: int, start: int, ids: np.ndarray, soft: bool = False) -> None:
        block, skip, left = start // BLOCK_BASES, start % BLOCK_BASES, ids.size
        if skip + left <= BLOCK_BASES:  # as most windows: one block, and no part of `ids` to be cut out
            at = self.offsets[block]
            data = os.pread(file, self.offsets[block + 1] - at, offset + at)
            if zlib.crc32(data) != self.checksums[block]:
                raise self.damaged(block, data)
            unpack_ids(data, skip, ids)
            if self.code_bytes[block] or soft:
                self._put_runs(block, data, skip, ids, soft)
            return
        first = BLOCK_BASES - skip
        self.fill(file, offset, start, ids[:first], soft)
        for done in range(first, left, BLOCK_BASES):
            self.fill(file, offset, start + done, ids[done : done + BLOCK_BASES], soft)

    def _put_runs(self, block: int, data: bytes, start: int, ids: np.ndarray, soft: bool) -> None:
        size = self.block_bases(block)
        at = packed_bytes(size)
        try:
            case_at = at + self.code_bytes[block]
            put_codes(decode_codes(data[at:case_at], size), start, ids)
            if soft and len(data) > case_at:
                put_soft(decode_soft(data[case_at:], size), start, ids)
        except (zlib.error, ValueError) as error:
            raise DataError(f"block {block} holds damaged runs ({error})") from None

    def damaged(self, block: int, data: bytes) -> DataError:
        """What to say of a block whose bytes do not match its checksum."""
        first, size = block * BLOCK_BASES, self.offsets[block + 1] - self.offsets[block]
        if len(data) != size:
            return DataError(f"it was cut short while in use, {len(data):,} of {size:,} bytes of block {block} read")
        last = first + self.block_bases(block)
        return DataError(f"block {block} (its bases {first + 1:,} to {last:,}) does not match its checksum")

    def block_bases(self, block: int) -> int:
        """Bases of a block."""
        return min(BLOCK_BASES, self.bases - block * BLOCK_BASES)


def encode(bases: np.ndarray) -> bytes:
    """A segment of ASCII bases (uint8, at least one IUPAC letter, of either case)."""
    rows, blocks = [], []
    for start in range(0, bases.size, BLOCK_BASES):
        packed, codes, case = encode_parts(bases[start : start + BLOCK_BASES])
        block = packed + codes + case
        rows.append((zlib.crc32(block), len(codes), len(case)))
        blocks.append(block)
    table = np.array(rows, dtype="<u4").tobytes()
    checksum = zlib.crc32(table, zlib.crc32(_HEAD.pack(MAGIC, bases.size, 0)[:8]))
    return _HEAD.pack(MAGIC, bases.size, checksum) + table + b"".join(blocks)


def decode(data: bytes) -> np.ndarray:
    """The ASCII bases that `encode` packed.

    Raises:
        DataError: a byte is missing, one too many, or not the one that was written.
    """
    size = _HEAD.unpack_from(data)[1] if len(data) >= _HEAD.size else 0
    layout = BlockLayout.parse(data, size, len(data))
    decoded = []
    for block, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        if zlib.crc32(data[start:end]) != layout.checksums[block]:
            raise layout.damaged(block, data[start:end])
        codes_at = start + packed_bytes(layout.block_bases(block))
        case_at = codes_at + layout.code_bytes[block]
        decoded.append(decode_parts(layout.block_bases(block), data[start:codes_at], data[codes_at:case_at],
                                    data[case_at:end]))
    return np.concatenate(decoded)
