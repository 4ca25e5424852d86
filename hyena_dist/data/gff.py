"""Classes of bases from an annotation (GFF3 or GTF): exons, introns, coding bases, untranslated ones and repeats."""

import re
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote

from hyena_dist.config.kinds import kind_of_text
from hyena_dist.data.bed import Bed, Row, merged, without
from hyena_dist.data.blocks import lines_of, refuse_other_kinds, start_of
from hyena_dist.data.errors import DataError

ENDINGS = (".gff", ".gff3", ".gtf", ".gff.gz", ".gff3.gz", ".gtf.gz")
"""Of the names of such files, in lower case."""
_LINE = 1 << 20
"""Bytes that a line may have."""
CLASSES = {
    "exon": "exon", "CDS": "CDS", "five_prime_UTR": "5' UTR", "three_prime_UTR": "3' UTR", "5UTR": "5' UTR",
    "3UTR": "3' UTR", "five_prime_utr": "5' UTR", "three_prime_utr": "3' UTR", "intron": "intron",
    **dict.fromkeys(("repeat_region", "dispersed_repeat", "tandem_repeat", "inverted_repeat", "direct_repeat",
                     "transposable_element", "transposon_fragment", "mobile_genetic_element", "low_complexity_region",
                     "satellite", "satellite_DNA", "microsatellite", "minisatellite", "LINE_element", "SINE_element",
                     "LTR_retrotransposon"), "repeat"),
}
"""The class of the types of rows that are read; others say nothing of what a base is, as a gene, or are of no class."""
_PARENT = re.compile(r"(?:^|;)\s*(?:Parent=(?P<gff>[^;]+)|transcript_id \"(?P<gtf>[^\"]+)\")")


def is_annotation(path: Path) -> bool:
    """Whether a file is one of these, by its name."""
    return path.name.lower().endswith(ENDINGS)


class Gff(Bed):
    """The rows of an annotation as those of a BED whose fourth column is the class. Rows past the end of their contig
    are cut and those of other contigs left out.

    Introns are what lies between the exons of a transcript and is in no exon of any; rows of type intron are read only
    where no exon says of which transcript it is.

    Raises:
        DataError: the file cannot be read, has a row that is none of an annotation, or none of the classes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.cut, self.count = path, True, 0
        self.rows: dict[str, list[Row]] = {}
        self._outside: dict[str, tuple[int, int, int]] = {}
        self._left_out: Counter[str] = Counter()
        self._exons: dict[tuple[str, str], list[Row]] = defaultdict(list)
        start, packed = start_of(path, empty_is="holds no rows; give a GFF3 or GTF")
        if kind_of_text(start):
            refuse_other_kinds(path, start, packed=packed, text="converted.gff3")
        for number, line in enumerate(lines_of(path, most=_LINE), 1):
            if line.startswith(b"##FASTA"):
                break
            if line.strip() and not line.startswith(b"#"):
                self._add(line.decode("utf-8", "replace").split("\t"), number)
        self._add_introns()
        if not self.rows:
            raise DataError(f"{path}: has no row of {', '.join(sorted(set(CLASSES.values())))}: give an annotation of "
                            "genes or repeats, or a BED with the class in its fourth column")

    def _add(self, fields: list[str], number: int) -> None:
        where = f"{self.path}: line {number}"
        if len(fields) < 8:
            raise DataError(f"{where}: has {len(fields)} columns between tabs; a GFF3 or GTF has 9")
        if not (all(re.fullmatch("[0-9]{1,18}", field) for field in fields[3:5])
                and 1 <= int(fields[3]) <= int(fields[4])):
            raise DataError(f"{where}: start {fields[3]!r} and end {fields[4]!r} must be whole numbers from 1 on, "
                            "start not after end")
        self.count += 1
        name, contig = CLASSES.get(fields[2]), unquote(fields[0])
        if name is None:
            self._left_out[fields[2]] += 1
            return
        row = Row(int(fields[3]) - 1, int(fields[4]), name, number)
        self.rows.setdefault(contig, []).append(row)
        if name == "exon" and len(fields) > 8 and (match := _PARENT.search(fields[8])):
            for parent in (match["gff"] or match["gtf"]).split(","):
                self._exons[contig, parent].append(row)

    def _add_introns(self) -> None:
        if not self._exons:
            return
        between: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for (contig, _), exons in self._exons.items():
            spans = merged((row.start, row.end) for row in exons)
            between[contig] += without(spans[0][0], spans[-1][1], spans)
        for contig, rows in self.rows.items():
            self._left_out["intron"] += sum(row.name == "intron" for row in rows)
            kept = [row for row in rows if row.name != "intron"]
            covered = merged((row.start, row.end) for row in kept if row.name == "exon")
            kept += [Row(start, end, "intron", 0) for span in merged(between[contig])
                     for start, end in without(*span, covered)]
            self.rows[contig] = kept

    def note(self) -> list[str]:
        """As that of a BED, and what was not read."""
        types = ", ".join(f"{count:,} {name}" for name, count in self._left_out.most_common(8) if count)
        return [*super().note(), *([f"{self.path}: rows of these types are of no class: {types}"] if types else [])]
