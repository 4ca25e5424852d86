"""FASTA files, one contig at a time, strictly: what is not surely a whole sequence is refused.

Plain, gzip and bgzip files are told apart by their first bytes, not by their names, and files of other kinds are named
with the command that converts them. Lines end in LF, CR LF or CR, also in one file. A sequence may hold the IUPAC codes
ACGTURYSWKMBDHVN in upper and lower case, which are kept. Gaps, stops, blanks and everything else are refused.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hyena_dist.config.errors import read_remedy
from hyena_dist.config.kinds import START_BYTES, inside_gzip, kind_of, not_as_it_is
from hyena_dist.config.plain import open_regular
from hyena_dist.data.errors import DataError

IUPAC = b"ACGTURYSWKMBDHVN"
_ALLOWED = IUPAC + IUPAC.lower() + b"\n"
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""What no header holds: a reader that took one for the end of the line would find a sequence behind it."""
_BETWEEN_TITLES = b"\x01"
"""Ctrl-A, behind the name: the one that a header may hold, because NCBI's databases join titles of one sequence so."""
_BLOCK = 1 << 24
_MAX_HEADER = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_HEADER = 18
"""Bytes of a member in which bgzip says that it made it."""
_GZIP_BLOCK = 1 << 16
"""Small, for what is left of a block at the end of a member is copied, and bgzip's members are small."""


class Source(NamedTuple):
    """A FASTA file and, where contig names repeat between files, what tells its contigs apart."""

    path: Path
    label: str = ""
    """Species of the file; its contigs are then called label.contig."""

    @classmethod
    def parse(cls, argument: str) -> "Source":
        """FASTA or LABEL=FASTA; a file whose own name has a '=' is taken as it is."""
        label, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            return cls(Path(argument))
        if not label.isidentifier():
            raise DataError(f"{argument}: write letters, digits and '_' before the '=', a letter first")
        return cls(Path(path), label)


class Contig(NamedTuple):
    """One FASTA record."""

    name: str
    """First word of the header, behind the label of its file if that has one."""
    source: Source
    bases: np.ndarray
    """ASCII codes as in the file, uint8."""


def as_dna(bases: np.ndarray) -> np.ndarray:
    """ASCII bases as shards hold them: those of RNA, which has U and no T, with T for U; all others as they are."""
    letters = bases & ~np.uint8(0x20)
    if not (letters == ord("U")).any() or (letters == ord("T")).any():
        return bases
    return np.where(letters == ord("U"), bases - 1, bases)


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


def _open(path: Path, raw: BinaryIO) -> "BinaryIO | _GzipMembers":
    """The uncompressed stream of a file.

    Raises:
        DataError: it is empty, or of another kind.
    """
    start = raw.read(START_BYTES)
    raw.seek(0)
    if not start:
        raise DataError(f"{path}: the file is empty; give a FASTA file that holds sequence")
    if not start.startswith(_GZIP_MAGIC):
        if kind := kind_of(start):
            raise DataError(not_as_it_is(kind, path, "converted.fa"))
        return raw
    if kind := kind_of(_GzipMembers(path, raw).read(START_BYTES)):
        raise DataError(not_as_it_is(inside_gzip(kind), path, "converted.fa"))
    raw.seek(0)
    return _GzipMembers(path, raw)


def _blocks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Uncompressed blocks of a file; `on_bytes` hears how many bytes on disk each took."""
    try:
        with open_regular(path) as raw:  # a named pipe cannot be read twice, and may never be written
            stream, position = _open(path, raw), 0
            while block := stream.read(_BLOCK):
                on_bytes(raw.tell() - position)
                position = raw.tell()
                yield block
            on_bytes(raw.tell() - position)
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut short; copy or download it again") from None
    except zlib.error as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); copy or download it again") from None
    except OSError as error:
        raise DataError(_cannot_be_read(path, error)) from None


def check_kind(path: Path) -> None:
    """Raises DataError: the file cannot be opened, is empty, or is of another kind than a reader of FASTA takes."""
    next(_blocks(path, _no_report), None)


def _cannot_be_read(path: Path, error: OSError) -> str:
    """One line on a file that cannot be opened or read, with the remedy for its kind."""
    if "but a pipe" in str(error):
        remedy = "a pipe can be read only once, and shards are verified against the file: write what comes out of it " \
                 "to a file first, as in `COMMAND > genome.fa`"
    elif "but a directory" in str(error):
        remedy = "give the FASTA files in it"
    else:
        remedy = read_remedy(error, "give the path of a FASTA file")
    return f"{path}: cannot be read ({error.strerror or error}); {remedy}"


def _with_line_feeds(blocks: Iterable[bytes]) -> Iterator[bytes]:
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


def _problem_of(header: bytes, name: bytes) -> str:
    """What is wrong with a header whose first word is `name`; nothing: ''."""
    shown = repr(name.decode("utf-8", "replace")[:80])
    found = _CONTROLS.search(name + header[len(name) :].replace(_BETWEEN_TITLES, b" "))
    if found:
        return f"byte {found[0][0]:#04x} at place {found.start() + 1:,} of the header {shown} is a control character"
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        return (f"byte {name[error.start]:#04x} at place {error.start + 1:,} of the name {shown} is not of UTF-8 text")
    odd = next((letter for letter in text if not letter.isprintable()), "")
    return f"{odd!a} in the name {shown} is not a character that can be seen" if odd else ""


class _Parser:
    """State of the reader between blocks: the open record, and the line for messages."""

    def __init__(self, source: Source):
        self.source = source
        self.path = source.path
        self.line = 1
        self.header: bytes | None = None
        """Header under way; None inside sequence."""
        self.name: str | None = None
        self.pieces: list[bytes] = []
        self.at_line_start = True

    def feed(self, block: bytes) -> Iterator[Contig]:
        position = 0
        while position < len(block):
            if self.header is not None:
                end = block.find(b"\n", position) + 1
                self._extend_header(block[position : end or len(block)], complete=end > 0)
            elif self.at_line_start and block[position] == ord(">"):
                yield from self.close()
                end, self.header = position + 1, b""
            else:
                end = block.find(b"\n>", position) + 1
                self._extend_sequence(block[position : end or len(block)])
            position = end or len(block)

    def _extend_header(self, piece: bytes, complete: bool) -> None:
        assert self.header is not None
        self.header += piece
        if len(self.header) > _MAX_HEADER:
            raise DataError(f"{self.path}: line {self.line}: a header of more than {_MAX_HEADER:,} bytes; "
                            f"this is not a FASTA file")
        if not complete:
            return
        words = self.header.split()
        if not words or self.header[:1].isspace():
            raise DataError(f"{self.path}: line {self.line}: a header without a name; write '>name'")
        if problem := _problem_of(self.header.removesuffix(b"\n"), words[0]):
            raise DataError(f"{self.path}: line {self.line}: {problem}; replace or remove it")
        name = words[0].decode("utf-8")
        self.name = f"{self.source.label}.{name}" if self.source.label else name
        self.header, self.at_line_start = None, True
        self.line += 1

    def _extend_sequence(self, piece: bytes) -> None:
        if piece.translate(None, _ALLOWED):
            raise DataError(self._describe_bad_byte(piece))
        sequence = piece.translate(None, b"\n")
        if sequence and self.name is None:
            raise DataError(f"{self.path}: line {self.line}: does not start with a '>' header; give a FASTA file")
        self.pieces.append(sequence)
        self.line += piece.count(b"\n")
        self.at_line_start = piece.endswith(b"\n")

    def _describe_bad_byte(self, piece: bytes) -> str:
        codes = np.frombuffer(piece, dtype=np.uint8)
        offset = int(np.flatnonzero(~np.isin(codes, np.frombuffer(_ALLOWED, dtype=np.uint8)))[0])
        if self.name is None:
            return (f"{self.path}: line {self.line}: byte {piece[offset]:#04x} before the first '>' header; "
                    f"give a FASTA file (plain, gzip or bgzip)")
        base = sum(map(len, self.pieces)) + len(piece[:offset].translate(None, b"\n")) + 1
        line = self.line + piece.count(b"\n", 0, offset)
        return (f"{self.path}: line {line}: byte {piece[offset : offset + 1]!r} at base {base:,} of {self.name!r} "
                f"is not an IUPAC code; write unknown bases as N")

    def close(self) -> Iterator[Contig]:
        """The record that ends here, if one is open."""
        if self.header is not None:
            raise DataError(f"{self.path}: line {self.line}: the file ends inside a header; it is cut short")
        if self.name is not None:
            bases = np.frombuffer(b"".join(self.pieces), dtype=np.uint8)
            if not bases.size:
                raise DataError(f"{self.path}: line {self.line}: record {self.name!r} has no sequence; "
                                f"the file is cut short or the record must go")
            yield Contig(self.name, self.source, bases)
        self.name, self.pieces = None, []


def _no_report(_: int) -> None:
    """Nobody watches the progress."""


def read_contigs(sources: Iterable[Source], on_bytes: Callable[[int], None] = _no_report) -> Iterator[Contig]:
    """All records of these files, in order, one in memory at a time.

    Args:
        on_bytes: called with the bytes on disk read since the last call, for a progress bar.

    Raises:
        DataError: a file is missing, empty, cut short, damaged or not FASTA, or a contig name comes twice.
    """
    seen: dict[str, Path] = {}
    for source in sources:
        for contig in _contigs_of(source, on_bytes):
            if contig.name in seen:
                first = seen[contig.name]
                where = "twice" if first == source.path else f"in {first} too"
                raise DataError(f"{source.path}: contig {contig.name!r} comes {where}; "
                                f"rename or remove one, or label the file as in mouse=FILE")
            seen[contig.name] = source.path
            yield contig


def _contigs_of(source: Source, on_bytes: Callable[[int], None]) -> Iterator[Contig]:
    parser = _Parser(source)
    for block in _with_line_feeds(_blocks(source.path, on_bytes)):
        yield from parser.feed(block)
    if parser.name is None and parser.header is None:
        raise DataError(f"{source.path}: holds no sequence; give a FASTA file")
    yield from parser.close()
