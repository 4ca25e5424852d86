"""The sequences that are embedded: records of a file, or regions of a reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyena_dist.data.bed import span_of, text_rows
from hyena_dist.data.contigs import Source, as_dna
from hyena_dist.data.errors import DataError
from hyena_dist.data.interval_rows import strand_of_bed
from hyena_dist.data.reference import Reference
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.tokenizer import BYTE_TO_ID, COMPLEMENT

OUTCOMES = {
    "embedded": "has its rows",
    "too_long": "longer than what the model was trained on",
    "unknown_contig": "the reference has no such contig",
    "outside": "not wholly on a sequence of the reference",
    "empty": "a region without a base, whose start is its end",
}
STRANDS = {"+": "+", ".": "+", "-": "-"}


class Sequence(NamedTuple):
    """One of them."""

    name: str
    contig: str
    start: int
    """From 0."""
    end: int
    strand: str
    """+ or -."""
    outcome: str
    ids: np.ndarray
    """uint8 [bases], as its strand is read; empty where it is not embedded."""


@dataclass(frozen=True)
class Records:
    """Every record of a file of sequence, whole."""

    path: Path
    assembly: str = ""

    def read(self, longest: int) -> Iterator[Sequence]:
        """In the order of the file; one in memory at a time.

        Args:
            longest: bases that are embedded.

        Raises:
            DataError: the file cannot be read.
        """
        for contig in read_contigs([Source(self.path)]):
            size = contig.bases.size
            outcome = "embedded" if size <= longest else "too_long"
            ids = BYTE_TO_ID[as_dna(contig.bases)] if size <= longest else _NONE
            yield Sequence(contig.name, contig.name, 0, size, "+", outcome, ids)


@dataclass(frozen=True)
class Regions:
    """Rows of a BED: their fourth column is the name, and the sixth, or of five the last, the strand that is read."""

    path: Path
    reference: Reference

    @property
    def assembly(self) -> str:
        """As the headers of the reference say."""
        return self.reference.assembly

    def read(self, longest: int) -> Iterator[Sequence]:
        """In the order of the file.

        Raises:
            DataError: the file cannot be read, or a row is none.
        """
        for number, fields in text_rows(self.path):
            where = f"{self.path}: line {number}"
            start, end = span_of(fields, where, empty=True)
            place = strand_of_bed(fields)
            strand = fields[5 if place is None else place] if len(fields) > 5 or place else ""
            if strand and strand not in STRANDS:
                raise DataError(f"{where}: strand {strand!r} in the sixth column must be +, - or .")
            strand = STRANDS[strand or "."]
            name = fields[3] if len(fields) > 3 and fields[3] else f"{fields[0]}:{start}-{end}"
            outcome, ids = self._bases(fields[0], start, end, longest)
            if strand == "-":
                ids = COMPLEMENT[ids[::-1]]
            yield Sequence(name, fields[0], start, end, strand, outcome, ids)

    def _bases(self, contig: str, start: int, end: int, longest: int) -> tuple[str, np.ndarray]:
        known = self.reference.find(contig)
        if known is None:
            return "unknown_contig", _NONE
        if start == end:
            return "empty", _NONE
        for stretch in self.reference.stretches[known]:
            if stretch.place.start <= start and end <= stretch.place.end:
                if end - start > longest:
                    return "too_long", _NONE
                first = stretch.begin + start - stretch.place.start
                return "embedded", self.reference.ids[first : first + end - start]
        return "outside", _NONE


_NONE = np.zeros(0, np.uint8)
