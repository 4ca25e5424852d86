"""A reference genome held in memory, and where on its chromosomes each of its sequences lies.

A file may hold slices of chromosomes. Where a slice lies is read from its header, as Ensembl, UCSC and `samtools faidx`
write it, or is given.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyena_dist.data.contigs import Contig, Source, as_dna
from hyena_dist.data.errors import DataError
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.tokenizer import BYTE_TO_ID

_REGION = re.compile(r"(?P<contig>[^:\s]+):(?P<first>[\d,]+)-(?P<last>[\d,]+)")
_ENSEMBL = re.compile(r"[a-z_]+:(?P<assembly>[^:\s]+):(?P<contig>[^:\s]+):(?P<first>\d+):(?P<last>\d+)"
                      r"(?::(?P<strand>-?1))?")
_UCSC = re.compile(r"range=(?P<contig>[^:\s]+):(?P<first>\d+)-(?P<last>\d+)\b")

_NAMED = 3
"""Chromosomes that a message names."""


class Place(NamedTuple):
    """Where on a chromosome a sequence lies."""

    contig: str
    start: int
    """Of its first base, from 0."""
    end: int
    assembly: str = ""
    """Of the chromosome, where a header says it."""


class Region(NamedTuple):
    """Two numbers that say where a sequence lies. Some count from 1 and mean both ends, as 17:101-200 for 100 bases;
    others count from 0 and end before the second, as BED does, 17:100-200. How many bases the sequence has says which.
    """

    contig: str
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Region":
        """Of `17:41196312-41277500`.

        Raises:
            DataError: something else.
        """
        match = _REGION.fullmatch(text)
        found = None if match is None else cls.of(match)
        if found is None or found.first > found.last:
            raise DataError(f"--region {text}: write CONTIG:FIRST-LAST, as 17:41196312-41277500")
        return found

    @classmethod
    def of(cls, match: re.Match[str]) -> "Region":
        """Of the groups contig, first and last."""
        return cls(match["contig"], *(int(match[key].replace(",", "") or 0) for key in ("first", "last")))

    def start(self, bases: int) -> int | None:
        """The place of the first of so many bases, from 0; None: they are not as many as the numbers say."""
        if self.last - self.first + 1 == bases and self.first > 0:
            return self.first - 1
        return self.first if self.last - self.first == bases else None


class Stretch(NamedTuple):
    """A sequence of the reference: bases `begin` to `end` of `Reference.ids`, which lie at `place`."""

    place: Place
    begin: int
    end: int


@dataclass(frozen=True)
class Reference:
    """The bases of all sequences behind one another."""

    ids: np.ndarray
    """uint8 [bases], token ids of single bases."""
    stretches: dict[str, list[Stretch]]
    """By the name of the chromosome; several slices of one are in the order of the file."""
    assembly: str
    """As the headers say; empty where they do not."""
    digest: str
    """sha256 of the bases and their places."""
    names: dict[str, str] = field(default_factory=dict)
    """The chromosome that each other name of it means, as chr17 for 17."""

    def find(self, contig: str) -> str | None:
        """The name that a chromosome has here; None where it is not here."""
        return contig if contig in self.stretches else self.names.get(contig)

    def against(self, unknown: Mapping[str, int]) -> str:
        """The names of a file's chromosomes that are not here beside those that are, for messages.

        Args:
            unknown: how many rows have each.
        """
        theirs = [f"{name} ({count:,})" for name, count in Counter(unknown).most_common()]
        return f"the file has {_few(theirs)}, the reference {_few(list(self.stretches))}"


def read_reference(path: Path, region: Region | None = None) -> Reference:
    """Read a reference; all of it is held, a byte for each base and an eighth more. While it is read its longest
    sequence is there a few times besides.

    Args:
        region: where the only sequence of the file lies, in place of what its header says.

    Raises:
        DataError: the file cannot be read, a place does not have as many bases as the sequence, or a region was given
            for several sequences.
    """
    held = bytearray()  # it grows in place: pieces that are joined at the end are there twice
    stretches: dict[str, list[Stretch]] = {}
    assemblies, digest = set(), sha256()
    for contig in read_contigs([Source(path)]):
        if region is not None and held:
            raise DataError(f"{path}: has several sequences, and --region says where one lies: leave --region out, or "
                            "give a file of one sequence")
        place = _place_of(contig, path, region)
        ids = BYTE_TO_ID[as_dna(contig.bases)]
        stretches.setdefault(place.contig, []).append(Stretch(place, len(held), len(held) + ids.size))
        assemblies.add(place.assembly)
        digest.update(f"{place.contig}:{place.start}-{place.end}\n".encode())
        digest.update(ids)
        held.extend(memoryview(ids))
    return Reference(np.frombuffer(held, np.uint8), stretches, ",".join(sorted(filter(None, assemblies))),
                     digest.hexdigest(), _other_names(list(stretches)))


def _few(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = [f"{len(names) - _NAMED:,} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])


def _place_of(contig: Contig, path: Path, region: Region | None) -> Place:
    bases, assembly, said = contig.bases.size, "", "--region"
    if region is None:
        match = next(filter(None, (_REGION.fullmatch(contig.name), _ENSEMBL.search(contig.header),
                                   _UCSC.search(contig.header))), None)
        if match is None:
            return Place(contig.name, 0, bases)
        if match.groupdict().get("strand") == "-1" or "strand=-" in contig.header:
            raise DataError(f"{path}: the header of {contig.name!r} says that it is of the reverse strand: give the "
                            "forward strand, on which variants are written")
        region, assembly, said = Region.of(match), match.groupdict().get("assembly") or "", "its header"
    start = region.start(bases)
    if start is None and _is_whole(contig, region, assembly):
        start = 0
    if start is None:
        raise DataError(f"{path}: the sequence {contig.name!r} has {bases:,} bases, and {said} says {region.contig}:"
                        f"{region.first}-{region.last}, which are {region.last - region.first + 1:,}: give a file of "
                        "this sequence alone, and the place of all of it with --region")
    return Place(region.contig, start, start + bases, assembly)


def _is_whole(contig: Contig, region: Region, assembly: str) -> bool:
    """Whether a sequence is all of a chromosome of which its header, one of Ensembl's, names only a part. So it is of
    the human Y: both of its ends are also on X, the file has N there, and the header has the place of the rest."""
    same_name = contig.name.removeprefix("chr") == region.contig.removeprefix("chr")
    return bool(assembly) and same_name and 0 < region.first <= region.last <= contig.bases.size


def _other_names(contigs: Sequence[str]) -> dict[str, str]:
    """With and without chr, and M for MT, where that is no chromosome of its own."""
    names: dict[str, str] = {}
    for contig in contigs:
        bare = contig.removeprefix("chr")
        same = {bare, f"chr{bare}"}
        if bare in ("M", "MT"):
            same |= {"M", "MT", "chrM", "chrMT"}
        names |= {name: contig for name in same if name not in contigs}
    return names
