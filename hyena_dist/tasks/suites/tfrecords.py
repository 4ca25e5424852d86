"""TFRecord files of one-hot sequences and their labels, as Basenji and Akita write them: read without TensorFlow.

A file is a stream of zlib of records: length, checksum, a protobuf `Example`, checksum. The features of an example are
strings of bytes.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import said_in_one_line
from hyena_dist.data.errors import DataError

_LENGTH = struct.Struct("<Q")
_MOST = 1 << 31
"""Bytes of a record; a million bases and their labels are five millions."""
_BLOCK = 1 << 20


def records(path: Path) -> Iterator[dict[str, bytes]]:
    """The features of each record of a file, by their names.

    Raises:
        DataError: it cannot be read, is damaged or cut short, or is no such file.
    """
    pieces = _unpacked(path)
    held = b""
    number = 0
    while True:
        while len(held) < 12 and (piece := next(pieces, b"")):
            held += piece
        if not held:
            break
        number += 1
        size = _LENGTH.unpack_from(held)[0] if len(held) >= 12 else _MOST + 1
        if size > _MOST:
            raise DataError(f"{path}: record {number}: is no record of TFRecord: copy or download the file again")
        parts = [held]
        known = len(held)
        while known < 12 + size + 4:
            piece = next(pieces, b"")
            if not piece:
                raise DataError(f"{path}: record {number}: is cut short: copy or download the file again")
            parts.append(piece)
            known += len(piece)
        held = b"".join(parts)
        yield _features(held[12 : 12 + size], f"{path}: record {number}")
        held = held[12 + size + 4 :]
    if not number:
        raise DataError(f"{path}: holds no records: copy or download the file again")


def _unpacked(path: Path) -> Iterator[bytes]:
    unpacker = zlib.decompressobj()
    with said_in_one_line(path), open_regular(path) as file:
        while block := file.read(_BLOCK):
            try:
                if piece := unpacker.decompress(block):
                    yield piece
            except zlib.error as error:
                raise DataError(f"{path}: is no TFRecord file of zlib ({error}): copy or download it again") from None
    if not unpacker.eof:
        raise DataError(f"{path}: is cut short: copy or download it again")


def _features(record: bytes, where: str) -> dict[str, bytes]:
    """Of Example {features: {feature: map<name, {bytes_list: {value}}>}}; each level is field 1, a map's value 2."""
    found = {}
    try:
        for features in _fields(record, 1):
            for entry in _fields(features, 1):
                [name], [value] = _fields(entry, 1), _fields(entry, 2)
                [of_bytes] = _fields(value, 1)
                [found[name.decode()]] = _fields(of_bytes, 1)
    except (ValueError, IndexError):
        raise DataError(f"{where}: is no Example of strings of bytes: copy or download the file again") from None
    return found


def _fields(message: bytes, wanted: int) -> list[bytes]:
    """The values of the length-delimited fields of a message that have this number.

    Raises:
        ValueError, IndexError: it is no message of such fields alone.
    """
    found, place = [], 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 != 2:
            raise ValueError
        size, place = _varint(message, place)
        if place + size > len(message):
            raise ValueError
        if tag >> 3 == wanted:
            found.append(message[place : place + size])
        place += size
    return found


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError


def array_of(features: dict[str, bytes], name: str, dtype: str, columns: int, where: str) -> np.ndarray:
    """[rows, columns], of a feature.

    Raises:
        DataError: it is not there, or is no such array.
    """
    text = features.get(name)
    if text is None or not text or len(text) % (np.dtype(dtype).itemsize * columns):
        raise DataError(f"{where}: its {name} is no array of {dtype} with {columns} columns: copy or download the file "
                        "again")
    return np.frombuffer(text, dtype=dtype).reshape(-1, columns)


def bases_of(one_hot: np.ndarray) -> bytes:
    """The sequence of rows of A, C, G, T; N where none is set.

    Args:
        one_hot: [bases, 4].
    """
    letters = np.frombuffer(b"ACGT", np.uint8)[one_hot.argmax(1)]
    return np.where(one_hot.any(1), letters, ord("N")).astype(np.uint8).tobytes()
