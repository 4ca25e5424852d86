"""The two haplotypes of a person as contigs: a reference, with the alleles of a VCF put in.

Contigs are called `HG00096.1.chr17` and `HG00096.2.chr17`. Splits and BED files are of the reference, and are carried
over: the same stretch is held out of both haplotypes, and of those of every other person.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np

from hyena_dist.data.contigs import Contig, Origin, Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.vcf import Genotypes, edits

_KNOWN = frozenset(b"ACGT")


def haplotypes(references: Iterable[Contig], source: Source) -> Iterator[Contig]:
    """Both haplotypes of each contig of a reference.

    Args:
        source: of the reference, with VCF and sample.

    Raises:
        DataError: the VCF cannot be read, has no such sample, or is of another reference: it says other bases than
            there are, or names contigs that are not there.
    """
    assert source.vcf is not None
    genotypes = Genotypes(source.vcf, source.sample)
    left = dict(genotypes.variants)
    for reference in references:
        name = reference.name.removeprefix(f"{source.label}." if source.label else "")
        left.pop(name, None)
        _drop_unknown(genotypes, name, reference.bases)
        for number in (0, 1):
            yield _haplotype(genotypes, name, reference, number)
    if left:
        contig = min(left)
        raise DataError(f"{source.vcf}: line {left[contig][0].line}: contig {contig!r} is not in {source.path}; give "
                        f"the reference of the VCF, or take the contigs of both with `bcftools view -r`")


def _drop_unknown(genotypes: Genotypes, name: str, bases: np.ndarray) -> None:
    """Leave out the variants where the reference has a code that is none of A, C, G and T; refuse another base."""
    kept = []
    for variant in genotypes.variants.get(name, []):
        there = bases[variant.start : variant.start + len(variant.reference)].tobytes().upper()
        if there == variant.reference.upper() or len(there) < len(variant.reference):
            kept.append(variant)  # `edits` counts those outside
        elif _KNOWN.issuperset(there):
            raise DataError(f"{genotypes.path}: line {variant.line}: REF is {variant.reference[:20].decode()} at "
                            f"{name}:{variant.start + 1}, the reference has {there[:20].decode()}; give the reference "
                            f"that the VCF was made with")
        else:
            genotypes.skipped.add("of a reference that is not known", variant.line)
    if name in genotypes.variants:
        genotypes.variants[name] = kept


def _haplotype(genotypes: Genotypes, name: str, reference: Contig, number: int) -> Contig:
    source = reference.source
    changes = list(edits(genotypes.variants.get(name, []), number, reference.bases.size, genotypes.skipped))
    pieces, reached = [], 0
    for start, end, allele in changes:
        new = np.frombuffer(allele.upper(), np.uint8)
        case = reference.bases[max(start - (start == end), 0)] & 0x20  # of what it replaces or comes behind
        pieces += [reference.bases[reached:start], new | case]
        reached = end
    bases = np.concatenate([*pieces, reference.bases[reached:]])
    if not bases.size:
        raise DataError(f"{genotypes.path}: sample {source.sample!r} has nothing left of contig {name!r}; check the "
                        f"VCF")
    origin = Origin(
        reference.name, reference.bases.size, genotypes, number + 1,
        np.array([start for start, _, _ in changes], np.int64), np.array([end for _, end, _ in changes], np.int64),
        np.array([0, *accumulate(len(allele) - (end - start) for start, end, allele in changes)], np.int64))
    prefix = f"{source.label}." if source.label else ""
    return Contig(f"{prefix}{source.sample}.{number + 1}.{name}", source, bases, origin)
