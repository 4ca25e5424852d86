"""Contigs, the sequences that every kind of source gives, and the names of the files that they come from."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from hyena_dist.data.blocks import OnBytes
from hyena_dist.data.errors import DataError

if TYPE_CHECKING:
    from hyena_dist.data.vcf import Genotypes

IUPAC = b"ACGTURYSWKMBDHVN"
"""The letters that a sequence may hold, in either case."""
ALLOWED = IUPAC + IUPAC.lower()


class Source(NamedTuple):
    """A file of sequence and, where contig names repeat between files, what tells its contigs apart."""

    path: Path
    label: str = ""
    """Species of the file; its contigs are then called label.contig."""
    vcf: Path | None = None
    sample: str = ""
    """Where the contigs are the two haplotypes of a person: file and column of the genotypes."""

    @classmethod
    def parse(cls, argument: str) -> "Source":
        """FILE or LABEL=FILE, with ::VCF::SAMPLE behind it for the haplotypes of a person. A file whose own name has a
        '=' or '::' is taken as it is."""
        if Path(argument).exists():
            return cls(Path(argument))
        file, *calls = argument.split("::")
        if len(calls) not in (0, 2) or not all((file, *calls)):
            raise DataError(f"{argument}: write FASTA::VCF::SAMPLE for the haplotypes of a person")
        if calls:
            return cls.parse(file)._replace(vcf=Path(calls[0]), sample=calls[1])
        label, equals, path = argument.partition("=")
        if not equals:
            return cls(Path(argument))
        if not label.isidentifier():
            raise DataError(f"{argument}: write letters, digits and '_' before the '=', a letter first")
        return cls(Path(path), label)


class Origin(NamedTuple):
    """The contig that a haplotype was made of, and how its places are those of the haplotype."""

    name: str
    bases: int
    genotypes: "Genotypes"
    """Of the person."""
    haplotype: int
    """1 or 2."""
    starts: np.ndarray
    ends: np.ndarray
    """Of the changes, in order and without overlap, int64; places of the origin."""
    shifts: np.ndarray
    """How many bases longer the haplotype is in front of each change, and behind the last, int64."""

    def place(self, place: int) -> int:
        """Where in the haplotype a place of the origin is; one inside a change is behind that, so that what is new
        belongs to the stretch before."""
        change = int(np.searchsorted(self.ends, place, side="right"))
        if change < self.starts.size and self.starts[change] < place:
            return int(self.ends[change] + self.shifts[change + 1])
        return int(place + self.shifts[change])


class Contig(NamedTuple):
    """One sequence of a file."""

    name: str
    """First word of the header of FASTA, or what names the sequence in another kind of file; behind the label of its
    file if that has one."""
    source: Source
    bases: np.ndarray
    """ASCII codes as in the file, uint8."""
    origin: Origin | None = None
    """Of a haplotype."""
    header: str = ""
    """The whole header of a record of FASTA, which may say where on a chromosome the sequence lies."""


def as_dna(bases: np.ndarray) -> np.ndarray:
    """ASCII bases as shards hold them: those of RNA, which has U and no T, with T for U; all others as they are."""
    letters = bases & ~np.uint8(0x20)
    if not (letters == ord("U")).any() or (letters == ord("T")).any():
        return bases
    return np.where(letters == ord("U"), bases - 1, bases)


class Reader(Protocol):
    """Reads one kind of file."""

    def __call__(self, source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
        """The contigs of a file in order, one in memory at a time, each named by `full_name`.

        Args:
            on_bytes: hears of the bytes on disk that were read.

        Raises:
            DataError: the file cannot be read, is cut short, or holds something else than sequence.
        """


def full_name(source: Source, name: bytes, where: str) -> str:
    """The name of a contig: what its file calls it, behind the label of the file where that has one.

    Args:
        where: file and place, for messages.

    Raises:
        DataError: the name is empty, no text of UTF-8, or holds a blank or what cannot be seen.
    """
    shown = repr(name.decode("utf-8", "replace")[:80])
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {name[error.start]:#04x} at place {error.start + 1:,} of the name {shown} is "
                        f"not of UTF-8 text; replace or remove it") from None
    if not text:
        raise DataError(f"{where}: a sequence without a name; give it one")
    odd = next((letter for letter in text if not letter.isprintable() or letter == " "), "")
    if odd:
        raise DataError(f"{where}: {odd!a} in the name {shown} is not a character that can be seen; replace or remove "
                        f"it")
    return f"{source.label}.{text}" if source.label else text


def sequence(text: bytes, where: str) -> np.ndarray:
    """The letters of a sequence that was read whole, uint8 [bases].

    Args:
        where: file, place and name, for messages.

    Raises:
        DataError: it is empty, or holds something else than IUPAC codes.
    """
    if not text:
        raise DataError(f"{where}: has no sequence; remove it, or get the file again")
    if odd := text.translate(None, ALLOWED):
        place = text.index(odd[:1]) + 1
        raise DataError(f"{where}: byte {odd[:1]!r} at base {place:,} is not an IUPAC code; write unknown bases as N")
    return np.frombuffer(text, np.uint8)
