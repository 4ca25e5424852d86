"""The classes of a BED or of an annotation, such as promoters and exons, as a label of every base."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hyena_dist.data.bed import Bed, merged
from hyena_dist.data.errors import DataError
from hyena_dist.data.gff import Gff, is_annotation

OUTSIDE = "outside the BED"
"""The class of bases that are in no row. No row may have it."""
MOST_CLASSES = 60
"""Each is a bit of an int64."""


class Regions:
    """Labels of bases by the rows of a BED, whose fourth column is the class, or of a GFF3 or GTF (`data.gff`). A base
    in rows of several classes is of each of them. Rows past the end of their contig are cut, those of other contigs are
    left out; `note` says how many.

    Args:
        contigs: bases of each contig.

    Raises:
        DataError: the file cannot be read, has a row without a class or too many classes, or no base of these contigs.
    """

    def __init__(self, path: Path, contigs: Mapping[str, int]) -> None:
        rows = Gff(path) if is_annotation(path) else Bed(path, cut=True, least=4, columns="contig, start, end, class")
        rows.check_contigs(contigs)
        names = list(dict.fromkeys(row.name for found in rows.rows.values() for row in found))
        if OUTSIDE in names:
            raise DataError(f"{path}: its fourth column has {OUTSIDE!r}, which is the class of the bases in no row: "
                            "remove these rows, or give them another class")
        if len(names) > MOST_CLASSES:
            raise DataError(f"{path}: its fourth column has {len(names):,} different names, and at most {MOST_CLASSES} "
                            f"can be told apart: write the class of a row there (promoter, exon), not its own name")
        masks = {contig: _masks(rows, contig, bases, names) for contig, bases in contigs.items() if contig in rows.rows}
        self._edges = {contig: edges for contig, (edges, _) in masks.items()}
        found = np.unique(np.concatenate([[0], *(mask for _, mask in masks.values())]))
        self._labels = {contig: np.searchsorted(found, mask) for contig, (_, mask) in masks.items()}
        if found.size == 1:
            raise DataError(f"{path} has no base of these shards: give a BED of their assembly, with their names of "
                            f"contigs (chr1 or 1?), as {', '.join(sorted(contigs)[:3])}")
        self.classes = [tuple(name for bit, name in enumerate(names) if mask >> bit & 1) or (OUTSIDE,)
                        for mask in found.tolist()]
        """Of each label, the classes of its bases."""
        self.note = rows.note()

    def labels(self, contig: str, start: int, end: int) -> np.ndarray:
        """The label of each of the bases [start, end) of a contig, int64."""
        if contig not in self._edges:
            return np.zeros(end - start, dtype=np.int64)
        edges = self._edges[contig]
        first, last = np.searchsorted(edges, start, "right") - 1, np.searchsorted(edges, end, "left")
        borders = np.concatenate([[start], edges[first + 1 : last], [end]])
        return np.repeat(self._labels[contig][first:last], np.diff(borders))


def _masks(rows: Bed, contig: str, bases: int, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the classes of a contig's bases change, from 0 on, and which they are from there on, a bit of each."""
    changes = []
    of_contig = rows.of(contig, bases)
    for bit, name in enumerate(names):
        for start, end in merged((row.start, row.end) for row in of_contig if row.name == name):
            changes += [(start, 1 << bit), (end, -1 << bit)]
    places, bits = np.array([(0, 0), *changes], dtype=np.int64).T
    edges, of_edge = np.unique(places, return_inverse=True)
    sums = np.zeros(edges.size, dtype=np.int64)
    np.add.at(sums, of_edge, bits)
    return edges, np.cumsum(sums)
