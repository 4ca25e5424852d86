"""GenBank flat files: the sequence behind ORIGIN of each record, and its name, VERSION's or else LOCUS's.

    LOCUS       SCU49845     5028 bp    DNA             PLN       21-JUN-1999
    VERSION     U49845.1
    ORIGIN
            1 gatcctccat atacaacggt atctccacct caggtttaga tctcaacaac ggaaccattg
    //

Each line says the place of its first base and LOCUS how many there are, and both are checked. GenBank writes sequence
in lower case, which says nothing of repeats: a record that is all in lower case is read as upper case; one of both
cases is kept as it is.
"""

import re
from collections.abc import Iterator

from hyena_dist.data.blocks import OnBytes, lines_of
from hyena_dist.data.contigs import Contig, Source, full_name, sequence
from hyena_dist.data.errors import DataError

_LOCUS = re.compile(rb"LOCUS +(\S+) +(\d{1,18}) +(bp|aa|rc)\b")
_SEQUENCE = re.compile(rb" *(\d{1,18}) ?([A-Za-z*.\- ]*)")


class _Record:
    """The record under way."""

    def __init__(self, source: Source, line: bytes, number: int):
        found = _LOCUS.match(line)
        where = f"{source.path}: line {number}"
        if not found:
            raise DataError(f"{where}: does not begin a record as `LOCUS name bases bp`; give a whole GenBank file")
        if found[3] != b"bp":
            raise DataError(f"{where}: is a record of protein; give nucleotides")
        self.source, self.name, self.bases = source, found[1], int(found[2])
        self.in_sequence = False
        self.pieces: list[bytes] = []
        self.size = 0

    @property
    def shown(self) -> str:
        """The name for messages."""
        return repr(self.name.decode("utf-8", "replace")[:80])

    def take(self, line: bytes, number: int) -> None:
        """A line of the record but its first and last."""
        where = f"{self.source.path}: line {number}"
        if not self.in_sequence:
            if line.startswith(b"VERSION") and (words := line.split()[1:]):
                self.name = words[0]
            elif line.startswith(b"LOCUS "):
                raise DataError(f"{where}: a record begins inside that of {self.shown}; the file is cut short there")
            self.in_sequence = line.startswith(b"ORIGIN")
        elif line.strip():
            found = _SEQUENCE.fullmatch(line.rstrip())
            if not found or int(found[1]) != self.size + 1:
                raise DataError(f"{where}: is not the line of sequence that begins with base {self.size + 1:,} of "
                                f"{self.shown}; get the file again")
            self.pieces.append(found[2].replace(b" ", b""))
            self.size += len(self.pieces[-1])

    def contig(self, number: int) -> Contig:
        """The record, which ends in this line."""
        where = f"{self.source.path}: line {number}: record {self.shown}"
        if not self.in_sequence or not self.size:
            raise DataError(f"{where} holds no sequence; get the file with it, as NCBI's `GenBank (full)`")
        if self.size != self.bases:
            raise DataError(f"{where} has {self.size:,} bases, its LOCUS says {self.bases:,}; get the file again")
        text = b"".join(self.pieces)
        bases = sequence(text.upper() if text.islower() else text, where)
        return Contig(full_name(self.source, self.name, where), self.source, bases)


def contigs(source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
    """The records of a GenBank file; see `contigs.Reader`."""
    record, number = None, 0
    for number, line in enumerate(lines_of(source.path, on_bytes), 1):
        if record is None:
            record = _Record(source, line, number) if line.strip() else None
        elif line.rstrip() == b"//":
            yield record.contig(number)
            record = None
        else:
            record.take(line, number)
    if record is not None:
        raise DataError(f"{source.path}: line {number}: the file ends inside record {record.shown}; it is cut short")
