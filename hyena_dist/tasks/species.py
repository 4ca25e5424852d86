"""Species classification from whole genomes: windows of any length, drawn by seed from what trains and from what is
held out, as tables that `hyena-dist finetune` reads."""

import csv
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.data.bed import Bed, Row, merged, overlap, without
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.sources import read_contigs
from hyena_dist.runtime.files import writing
from hyena_dist.tasks.suites.rows import Interval, cut

SPLITS = ("train", "val", "test")
FILES = {"train": "train.csv", "val": "dev.csv", "test": "test.csv"}
WINDOWS = "windows.json"
MOST_UNKNOWN = 0.1
"""Share of N and other codes up to which a window is used."""


@dataclass(frozen=True)
class HeldOut:
    """Which bases do not train: whole contigs, and stretches of others."""

    contigs: Mapping[str, Collection[str]]
    """Of val and of test, each called species.contig."""
    bed: Bed | None = None
    """Rows of contig, start, end, and val (or valid, dev) or test."""

    def parts(self, contig: str, bases: int) -> dict[str, list[tuple[int, int]]]:
        """The stretches of a contig by their split.

        Raises:
            DataError: a row is of no split or lies outside the contig, or bases are of two.
        """
        whole = [split for split in ("val", "test") if contig in self.contigs.get(split, ())]
        if len(whole) > 1:
            raise DataError(f"--val-contigs and --test-contigs: {contig!r} is in both: a contig is of one split")
        held: dict[str, list[tuple[int, int]]] = {split: [(0, bases)] for split in whole}
        for row in self.bed.of(contig, bases) if self.bed else []:
            held.setdefault(self._split_of(row), []).append((row.start, row.end))
        found = {split: merged(spans) for split, spans in held.items()}
        if len(found) == 2 and any(overlap(start, end, found["test"]) for start, end in found["val"]):
            raise DataError(f"{contig}: bases of it are held out for val and for test: no base may be of two splits")
        every = merged(span for spans in found.values() for span in spans)
        return {"train": [span for span in without(0, bases, every) if span[0] < span[1]], **found}

    def _split_of(self, row: Row) -> str:
        assert self.bed is not None
        split = {"valid": "val", "validation": "val", "dev": "val"}.get(row.name.lower(), row.name.lower())
        if split not in ("val", "test"):
            raise DataError(f"{self.bed.path}: line {row.line}: the fourth column is {row.name!r}, and must be val or "
                            "test: all other bases train")
        return split

    def check_contigs(self, known: Collection[str]) -> None:
        """Raises DataError: a contig is in none of the files."""
        for split, names in self.contigs.items():
            for name in names:
                if name not in known:
                    raise DataError(f"--{split}-contigs: {name!r} is in none of the files; write species.contig, and "
                                    "check the name (chr1 or 1?)")
        if self.bed is not None:
            self.bed.check_contigs(known)


def draw(sources: Sequence[Source], held: HeldOut, *, length: int, counts: Mapping[str, int], seed: int,
         out: Path) -> dict[str, Any]:
    """Draw windows of every species and split and write them into a new directory.

    Args:
        sources: a file for each species, which is its label.
        length: bases of a window.
        counts: windows of each species in train, val and test.

    Returns:
        What windows.json holds: of every split and species the bases that windows were drawn from, how many windows
        of them share no base, and notes.

    Raises:
        DataError: a file cannot be used, or a split of a species has no room for its windows.
        OSError: the directory cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out}: is there already: give another, or remove it")
    spans = _spans(sources, held)
    content = _content(spans, length, counts, seed)
    aside = out.with_name(f"{out.name}.tmp")
    with writing(out):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            rows = {split: _windows(sources, spans, split, length, counts[split], seed) for split in SPLITS}
            for split in SPLITS:
                with (aside / FILES[split]).open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(("sequence", "label", "name"))
                    writer.writerows(rows[split])
            (aside / WINDOWS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            if out.exists():
                out.rmdir()
            os.replace(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return content


Spans = dict[str, dict[str, list[tuple[str, int, int]]]]
"""Of each species and split the stretches: contig as its file calls it, first base, end."""


def _spans(sources: Sequence[Source], held: HeldOut) -> Spans:
    """Raises DataError: two files are of one species, one has no name, or a contig that is held out is not there."""
    found: Spans = {}
    known: set[str] = set()
    for source in sources:
        if not source.label or source.label in found:
            raise DataError(f"{source.path}: write a name of its own for its species in front, as in "
                            f"human={source.path}")
        parts = found[source.label] = {split: [] for split in SPLITS}
        for contig in read_contigs([Source(source.path)]):
            name = f"{source.label}.{contig.name}"
            known.add(name)
            for split, spans in held.parts(name, len(contig.bases)).items():
                parts[split] += [(contig.name, start, end) for start, end in spans]
    if len(found) < 2:
        raise DataError("one species is none to tell apart: give two or more files, as in human=hg38.fa.gz "
                        "mouse=mm39.fa.gz")
    held.check_contigs(known)
    return found


def _content(spans: Spans, length: int, counts: Mapping[str, int], seed: int) -> dict[str, Any]:
    of_split: dict[str, Any] = {split: {} for split in SPLITS}
    notes = []
    for species, parts in spans.items():
        for split in SPLITS:
            bases = sum(end - start for _, start, end in parts[split])
            disjoint = sum((end - start) // length for _, start, end in parts[split])
            of_split[split][species] = {"windows": counts[split], "bases": bases, "disjoint": disjoint}
            if split != "train" and counts[split] > disjoint:
                notes.append(f"{split} of {species}: {bases:,} bases have room for {disjoint:,} windows that share "
                             f"none, not for {counts[split]:,}: windows overlap, and an interval must count fewer")
    return {"length": length, "seed": seed, "splits": of_split, "notes": notes}


def _windows(sources: Sequence[Source], spans: Spans, split: str, length: int, count: int,
             seed: int) -> list[tuple[str, str, str]]:
    """Sequence, species and place of each window of a split, species by species. Every place is as likely, and none
    comes twice."""
    found = []
    for source in sources:
        places = _places(spans[source.label][split], source, split, length, count, seed)
        bases = {place.where: window for place, window in cut(places, source.path, outside="refuse")}
        drawn = [(bases[place.where].decode(), source.label, place.name) for place in places
                 if _unknown(bases[place.where]) <= MOST_UNKNOWN * length][:count]
        if len(drawn) < count:
            raise DataError(f"{source.path}: {split} of {source.label} has {len(drawn):,} windows of {length:,} bases "
                            f"with at most {MOST_UNKNOWN:.0%} unknown among {len(places):,} that were drawn, and "
                            f"{count:,} are wanted: hold out more, or ask for fewer")
        found += drawn
    return found


def _places(spans: Sequence[tuple[str, int, int]], source: Source, split: str, length: int, count: int,
            seed: int) -> list[Interval]:
    """Windows in the order in which they are drawn, twice as many as are wanted, for some are of unknown bases. They
    depend on the species' name, not on the order of the files."""
    ends = list(accumulate(max(end - start - length + 1, 0) for _, start, end in spans))
    total = ends[-1] if ends else 0
    if total < count:
        raise DataError(f"{source.path}: {split} of {source.label} has {total:,} places for windows of {length:,} "
                        f"bases, and {count:,} are wanted: hold out other stretches, or take shorter windows")
    key = np.frombuffer(hashlib.sha256(f"{source.label} {split}".encode()).digest(), dtype=np.uint32)
    rng = np.random.default_rng([seed, *map(int, key)])
    found = []
    for number, place in enumerate(rng.choice(total, size=min(total, 2 * count + 16), replace=False).tolist()):
        index = bisect_right(ends, place)
        contig, first, _ = spans[index]
        start = first + place - (ends[index - 1] if index else 0)
        found.append(Interval(contig, start, start + length, source.label, split, str(number)))
    return found


def _unknown(bases: bytes) -> int:
    return len(bases.translate(None, b"ACGTacgt"))
