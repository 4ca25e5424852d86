"""Files as blocks of uncompressed bytes: plain, gzip and bgzip, told apart by their first bytes, not by their names."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hyena_dist.config.errors import read_remedy
from hyena_dist.config.kinds import START_BYTES, inside_gzip, kind_of, not_as_it_is
from hyena_dist.config.plain import open_regular
from hyena_dist.data.errors import DataError

OnBytes = Callable[[int], None]
"""Hears how many bytes on disk were read since it heard last, for a progress bar."""
_BLOCK = 1 << 24
_LINES = 1 << 18
"""Bytes of a block that is cut into lines, each of which is an object of its own: what is held does not grow with the
file."""
MOST_LINE = 1 << 31
"""Bytes of a line; a line of JSON may hold a chromosome."""
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_HEADER = 18
"""Bytes of a member in which bgzip says that it made it."""
_GZIP_BLOCK = 1 << 16
"""Small, for what is left of a block at the end of a member is copied, and bgzip's members are small."""


def no_report(_: int) -> None:
    """Nobody watches the progress."""


class _GzipMembers:
    """What the members of a gzip file hold, one after the other; those of bgzip and of gzip may alternate, as in files
    that were joined, and zeros behind them are padding.

    Raises, while it is read:
        EOFError: it ends inside a member.
        zlib.error: it is damaged.
        DataError: the bgzip file, or the first of those that were joined, has lost its end: each has an empty member
            there, so that a file cut between two members is known.
    """

    def __init__(self, path: Path, raw: BinaryIO):
        self._path, self._raw = path, raw
        self._pieces = self._read_members()
        self._held: list[bytes] = []

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        held = sum(map(len, self._held))
        while held < size and (piece := next(self._pieces, None)) is not None:
            self._held.append(piece)
            held += len(piece)
        data = b"".join(self._held)
        self._held = [data[size:]]
        return data[:size]

    def _read_members(self) -> Iterator[bytes]:
        data, open_bgzip = self._raw.read(_GZIP_BLOCK), False
        while data:
            if len(data) < _GZIP_HEADER:
                data += self._raw.read(_GZIP_BLOCK)
            is_bgzip = bool(data[3:4] and data[3] & 4) and data[12:14] == b"BC"
            if open_bgzip and not is_bgzip:
                break
            unpacker, size = zlib.decompressobj(zlib.MAX_WBITS | 16), 0
            while not unpacker.eof:
                if not data:
                    raise EOFError
                piece = unpacker.decompress(data)
                size += len(piece)
                data = unpacker.unused_data or (b"" if unpacker.eof else self._raw.read(_GZIP_BLOCK))
                if piece:
                    yield piece
            open_bgzip = is_bgzip and size > 0
            data = self._without_zeros(data)
        if open_bgzip:
            raise DataError(f"{self._path}: the bgzip file is cut short (no end marker); copy or download it again")

    def _without_zeros(self, data: bytes) -> bytes:
        """What follows a member, from the first byte on that is not 0; nothing: the file ends here."""
        data = data.lstrip(b"\0")
        while not data and (block := self._raw.read(_GZIP_BLOCK)):
            data = block.lstrip(b"\0")
        return data


def start_of(path: Path, empty_is: str = "the file is empty; give a file that holds sequence") -> tuple[bytes, bool]:
    """The first bytes that a file holds, and whether it is a gzip file; the bytes are then those that are packed in it.

    Args:
        empty_is: what to say of an empty file.

    Raises:
        DataError: it cannot be read, is empty, or its gzip data are damaged.
    """
    with said_in_one_line(path), open_regular(path) as raw:  # a named pipe cannot be read twice, or never ends
        start = raw.read(START_BYTES)
        if not start:
            raise DataError(f"{path}: {empty_is}")
        if not start.startswith(_GZIP_MAGIC):
            return start, False
        raw.seek(0)
        return _GzipMembers(path, raw).read(START_BYTES), True


def refuse_other_kinds(path: Path, start: bytes, *, packed: bool, text: str = "converted.fa") -> None:
    """Raises DataError: a file with this start is of a kind that is not read here; says what makes `text` of it."""
    if kind := kind_of(start):
        raise DataError(not_as_it_is(inside_gzip(kind) if packed else kind, path, text))


def blocks(path: Path, on_bytes: OnBytes = no_report, most: int | None = None) -> Iterator[bytes]:
    """The uncompressed bytes of a file, a block at a time.

    Args:
        most: bytes of a block; None: as many as are read fast.

    Raises:
        DataError: it cannot be read, or its gzip data are damaged or cut short.
    """
    packed = start_of(path)[1]
    with said_in_one_line(path), open_regular(path) as raw:
        stream, position = _GzipMembers(path, raw) if packed else raw, 0
        while block := stream.read(most or _BLOCK):
            on_bytes(raw.tell() - position)
            position = raw.tell()
            yield block
        on_bytes(raw.tell() - position)


@contextmanager
def said_in_one_line(path: Path) -> Iterator[None]:
    """What fails in here ends in a DataError that names the file."""
    try:
        yield
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut short; copy or download it again") from None
    except zlib.error as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); copy or download it again") from None
    except OSError as error:
        raise DataError(_cannot_be_read(path, error)) from None


def _cannot_be_read(path: Path, error: OSError) -> str:
    """One line on a file that cannot be opened or read, with the remedy for its kind."""
    if "but a pipe" in str(error):
        remedy = "a pipe can be read only once, and shards are verified against the file: write what comes out of it " \
                 "to a file first, as in `COMMAND > genome.fa`"
    elif "but a directory" in str(error):
        remedy = "give the FASTA files in it"
    else:
        remedy = read_remedy(error, "give the path of a file")
    return f"{path}: cannot be read ({error.strerror or error}); {remedy}"


def with_line_feeds(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same lines with LF at the end of each; CR LF may lie across two blocks."""
    held = b""
    for block in blocks:
        text = held + block
        held = b"\r" if text.endswith(b"\r") else b""
        text = text[: len(text) - len(held)]
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if text:
            yield text
    if held:
        yield b"\n"


def lines_of(path: Path, on_bytes: OnBytes = no_report, most: int = MOST_LINE) -> Iterator[bytes]:
    """The lines of a text file without their ends, which may be LF, CR LF or CR.

    Raises:
        DataError: as `blocks`; or a line has more than `most` bytes, so that this is no such text.
    """
    held: list[bytes] = []  # of a line that began in an earlier block
    size = 0
    for block in with_line_feeds(blocks(path, on_bytes, min(_BLOCK, _LINES))):
        first, *rest = block.split(b"\n")
        held.append(first)
        size += len(first)
        if size > most:
            raise DataError(f"{path}: a line has more than {most:,} bytes; this is no such file")
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held, size = [rest[-1]], len(rest[-1])
    if size:
        yield b"".join(held)
