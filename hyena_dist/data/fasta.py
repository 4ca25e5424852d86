"""FASTA files, one contig at a time, strictly: what is not surely a whole sequence is refused.

Lines end in LF, CR LF or CR, also in one file. A sequence may hold the IUPAC codes ACGTURYSWKMBDHVN in upper and lower
case, which are kept. Gaps, stops, blanks and everything else are refused.
"""

import re
from collections.abc import Iterator

import numpy as np

from hyena_dist.data.blocks import OnBytes, blocks, with_line_feeds
from hyena_dist.data.contigs import ALLOWED, Contig, Source, full_name
from hyena_dist.data.errors import DataError

_LINES = ALLOWED + b"\n"
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""What no header holds: a reader that took one for the end of the line would find a sequence behind it."""
_BETWEEN_TITLES = b"\x01"
"""Ctrl-A, behind the name: the one that a header may hold, because NCBI's databases join titles of one sequence so."""
_MAX_HEADER = 1 << 20


def _problem_of(header: bytes, name: bytes) -> str:
    """What is wrong with a header, but for its first word, which is `name`; nothing: ''."""
    shown = repr(name.decode("utf-8", "replace")[:80])
    found = _CONTROLS.search(name + header[len(name) :].replace(_BETWEEN_TITLES, b" "))
    if found:
        return f"byte {found[0][0]:#04x} at place {found.start() + 1:,} of the header {shown} is a control character"
    return ""


class _Parser:
    """State of the reader between blocks: the open record, and the line for messages."""

    def __init__(self, source: Source):
        self.source = source
        self.path = source.path
        self.line = 1
        self.header: bytes | None = None
        """Header under way; None inside sequence."""
        self.name: str | None = None
        self.title = ""
        """The whole header of the open record."""
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
        self.name = full_name(self.source, words[0], f"{self.path}: line {self.line}")
        self.title = self.header.decode("utf-8", "replace").strip()
        self.header, self.at_line_start = None, True
        self.line += 1

    def _extend_sequence(self, piece: bytes) -> None:
        if piece.translate(None, _LINES):
            raise DataError(self._describe_bad_byte(piece))
        sequence = piece.translate(None, b"\n")
        if sequence and self.name is None:
            raise DataError(f"{self.path}: line {self.line}: does not start with a '>' header; give a FASTA file")
        self.pieces.append(sequence)
        self.line += piece.count(b"\n")
        self.at_line_start = piece.endswith(b"\n")

    def _describe_bad_byte(self, piece: bytes) -> str:
        codes = np.frombuffer(piece, dtype=np.uint8)
        offset = int(np.flatnonzero(~np.isin(codes, np.frombuffer(_LINES, dtype=np.uint8)))[0])
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
            yield Contig(self.name, self.source, bases, header=self.title)
        self.name, self.pieces = None, []


def contigs(source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
    """The records of a FASTA file; see `contigs.Reader`."""
    parser = _Parser(source)
    for block in with_line_feeds(blocks(source.path, on_bytes)):
        yield from parser.feed(block)
    if parser.name is None and parser.header is None:
        raise DataError(f"{source.path}: holds no sequence; give a FASTA file")
    yield from parser.close()
