"""Every kind of file that sequence comes from, told by what is in it: FASTA, GenBank, UCSC's 2bit, JSON lines, parquet.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from hyena_dist.data import fasta, genbank, jsonl, parquet, twobit
from hyena_dist.data.blocks import OnBytes, no_report, refuse_other_kinds, start_of
from hyena_dist.data.contigs import Contig, Reader, Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.haplotypes import haplotypes

_IN_GZIP_TOO: dict[bytes, Reader] = {b"LOCUS ": genbank.contigs, b"{": jsonl.contigs}
"""How a file begins, and what reads it."""
_BY_OFFSETS: dict[bytes, Reader] = {twobit.MAGIC: twobit.contigs, twobit.MAGIC[::-1]: twobit.contigs,
                                    b"PAR1": parquet.contigs}
"""Files that are read at offsets, which those of a gzip file are not."""


def reader_of(path: Path) -> Reader:
    """What reads a file, by its first bytes.

    Raises:
        DataError: the file cannot be opened, is empty, or is of a kind that nothing here reads.
    """
    start, packed = start_of(path)
    for sign, reader in _IN_GZIP_TOO.items():
        if start.lstrip().startswith(sign):
            return reader
    for sign, reader in _BY_OFFSETS.items():
        if start.startswith(sign):
            if packed:
                raise DataError(f"{path}: cannot be read inside gzip; unpack it with `gunzip`, and give what that "
                                f"makes")
            return reader
    refuse_other_kinds(path, start, packed=packed)
    return fasta.contigs


def contigs_of(source: Source, on_bytes: OnBytes = no_report) -> Iterator[Contig]:
    """The contigs of one file; with a VCF, the haplotypes of a person."""
    found = reader_of(source.path)(source, on_bytes)
    return haplotypes(found, source) if source.vcf else found


def read_contigs(sources: Iterable[Source], on_bytes: OnBytes = no_report) -> Iterator[Contig]:
    """All contigs of these files, in order, one in memory at a time.

    Raises:
        DataError: a file is missing, empty, cut short, damaged or of another kind, or a contig name comes twice.
    """
    seen: dict[str, Path] = {}
    for source in sources:
        for contig in contigs_of(source, on_bytes):
            if contig.name in seen:
                first = seen[contig.name]
                where = "twice" if first == source.path else f"in {first} too"
                raise DataError(f"{source.path}: contig {contig.name!r} comes {where}; "
                                f"rename or remove one, or label the file as in mouse=FILE")
            seen[contig.name] = source.path
            yield contig
