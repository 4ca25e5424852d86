"""The genotypes of one person in a VCF, strictly: what cannot be put into a sequence is not guessed, but counted.

Only text (plain, gzip or bgzip) is read. A variant counts where its alleles are sequence (single bases, insertions,
deletions); symbolic ones (<DEL>), `*` and break-ends are left out. A genotype counts where it is phased (`0|1`), or the
same on both haplotypes (`1/1`), or of one haplotype alone (`1`, as on X and Y of a man); others are left as the
reference.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hyena_dist.data.blocks import lines_of, refuse_other_kinds, start_of
from hyena_dist.data.contigs import ALLOWED
from hyena_dist.data.errors import DataError

_FIXED = 9
"""Columns before the first sample."""


class Variant(NamedTuple):
    """What a person has at a place, where a haplotype is not the reference."""

    start: int
    """First base of the reference allele, from 0."""
    reference: bytes
    alleles: tuple[bytes, bytes]
    """Of the two haplotypes."""
    line: int


class Skipped:
    """Genotypes that were left as the reference, by why, with the line of the first."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}

    def add(self, why: str, line: int) -> None:
        """One more."""
        count, first = self.counts.get(why, (0, line))
        self.counts[why] = count + 1, first


class Genotypes:
    """The variants of one sample of a VCF by contig, in order; read whole.

    Raises:
        DataError: the file cannot be read, is no VCF, is cut short, or has no such sample.
    """

    def __init__(self, path: Path, sample: str):
        self.path, self.sample = path, sample
        self.variants: dict[str, list[Variant]] = {}
        self.skipped = Skipped()
        start, packed = start_of(path, empty_is="the file is empty; give a VCF")
        if not start.startswith(b"##fileformat=VCF"):
            refuse_other_kinds(path, start, packed=packed, text="converted.vcf")
            raise DataError(f"{path}: is no VCF, which begins with ##fileformat=VCF; of a BCF make one with "
                            f"`bcftools view`")
        column = 0
        for number, line in enumerate(lines_of(path), 1):
            if line.startswith(b"#CHROM"):
                column = self._column(line)
            elif line and not line.startswith(b"#"):
                if not column:
                    raise DataError(f"{path}: line {number}: comes before the line #CHROM; the header is damaged")
                self._add(line, column, number)
        if not column:
            raise DataError(f"{path}: has no line #CHROM; it is cut short")
        for found in self.variants.values():
            found.sort(key=lambda variant: variant.start)

    def notes(self) -> list[str]:
        """A line on what was put in, and on what was left as the reference, and why."""
        left = ", ".join(f"{count:,} {why} (the first in line {line:,})"
                         for why, (count, line) in self.skipped.counts.items())
        return [f"{self.path}: sample {self.sample}: {sum(map(len, self.variants.values())):,} variants; left as the "
                f"reference: {left or 'none'}"]

    def _column(self, line: bytes) -> int:
        names = [name.decode("utf-8", "replace") for name in line.split(b"\t")[_FIXED:]]
        if names.count(self.sample) != 1:
            raise DataError(f"{self.path}: has {'no' if self.sample not in names else 'more than one'} sample "
                            f"{self.sample!r}; it has {', '.join(names[:5]) or 'none'}{', ...' * (len(names) > 5)}")
        return _FIXED + names.index(self.sample)

    def _add(self, line: bytes, column: int, number: int) -> None:
        fields = line.split(b"\t", column + 1)
        where = f"{self.path}: line {number}"
        if len(fields) <= column:
            raise DataError(f"{where}: has {len(fields)} columns, too few for sample {self.sample!r}; it is cut short")
        contig, place, _, reference, others, *_ = fields
        if not (place.isdigit() and len(place) < 19 and int(place) > 0) or not _is_sequence(reference):
            raise DataError(f"{where}: has POS {place[:20]!r} and REF {reference[:20]!r}; POS is from 1 on and REF is "
                            f"bases")
        alleles = [reference, *others.split(b",")]
        numbers = self._genotype(fields[8].split(b":"), fields[column].split(b":"), len(alleles), where, number)
        if numbers is None or not any(numbers):
            return
        found = tuple(alleles[i] for i in numbers)
        if not all(map(_is_sequence, found)):
            self.skipped.add("symbolic", number)
            return
        first, second = found
        self.variants.setdefault(contig.decode("utf-8", "replace"), []).append(
            Variant(int(place) - 1, reference, (first, second), number))

    def _genotype(self, keys: list[bytes], values: list[bytes], alleles: int, where: str,
                  number: int) -> tuple[int, int] | None:
        """Numbers of the alleles of the two haplotypes; None where they are not known."""
        if keys[0] != b"GT":
            self.skipped.add("without genotype", number)
            return None
        text = values[0]
        phased = b"/" not in text
        parts = text.replace(b"/", b"|").split(b"|")
        if b"." in parts or not text:
            self.skipped.add("missing", number)
            return None
        if len(parts) > 2 or not all(part.isdigit() and len(part) < 6 and int(part) < alleles for part in parts):
            raise DataError(f"{where}: has the genotype {text[:20]!r} of {alleles} alleles; give numbers of alleles of "
                            f"at most two haplotypes")
        first, last = int(parts[0]), int(parts[-1])
        if not phased and first != last:
            self.skipped.add("unphased", number)
            return None
        return first, last


def _is_sequence(allele: bytes) -> bool:
    return bool(allele) and not allele.translate(None, ALLOWED)


def edits(variants: list[Variant], haplotype: int, bases: int, skipped: Skipped) -> Iterator[tuple[int, int, bytes]]:
    """What changes on a haplotype: first base, end and the new bases, in order and without overlap. A variant that
    overlaps the one before it, or lies outside the contig, is left out.

    Args:
        haplotype: 0 or 1.
    """
    reached, inserted = 0, -1  # where the last change ends, and where the last insertion is
    for variant in variants:
        start, reference, allele = variant.start, variant.reference, variant.alleles[haplotype]
        if allele == reference:
            continue
        while len(allele) > 1 and len(reference) > 1 and allele[-1:].upper() == reference[-1:].upper():
            allele, reference = allele[:-1], reference[:-1]  # what is common at the end
        while allele and reference and allele[:1].upper() == reference[:1].upper():
            allele, reference, start = allele[1:], reference[1:], start + 1  # the base before an indel
        if not allele and not reference:
            continue
        if start + len(reference) > bases:
            skipped.add("outside", variant.line)
        elif start < reached or start == inserted and not reference:
            skipped.add("overlapping", variant.line)
        else:
            yield start, start + len(reference), allele
            reached, inserted = start + len(reference), -1 if reference else start
