"""Two tasks of DNALONGBENCH whose labels are numbers of bins, or of pairs of bins, in TFRecords: regulatory activity,
of the windows of a BED, and contact maps, which have their sequences with them."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hyena_dist.config.plain import read_object
from hyena_dist.data.bed import text_rows
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.places import Values
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.tables import Example
from hyena_dist.tasks.suites.description import MissingFiles, Task, first_of
from hyena_dist.tasks.suites.rows import Interval, filled
from hyena_dist.tasks.suites.tfrecords import array_of, bases_of, records

SPLITS = ("train", "valid", "test")
ACTIVITY_WINDOW, ACTIVITY_BINS = 196_608, 896
CELLS = ("HFF", "H1hESC", "GM12878", "IMR90", "HCT116")
"""Of the contact maps, in the order of their columns."""
CONTACT_BINS, CONTACT_CUT = 512, 32
CONTACTS = 446 * 447 // 2
"""Pairs of the 448 bins inside that are at least two apart."""


def _parts(folder: Path, split: str, where: str) -> list[Path]:
    """The files of a split, by their numbers: the rows of a BED belong to the records in that order.

    Raises:
        MissingFiles: there is none, or one is missing between others.
    """
    found = {int(match[1]): path for path in folder.glob(f"{split}-*.tfr")
             if (match := re.fullmatch(rf"{split}-(0|[1-9][0-9]{{0,9}})[.]tfr", path.name))}
    missing = next(number for number in range(len(found) + 1) if number not in found)
    if missing < max(found, default=0) or not found:
        raise MissingFiles(f"{folder / f'{split}-{missing}.tfr'}: the records of {split} are not there", where)
    return [found[number] for number in sorted(found)]


def contact_files(data: Path, where: str) -> list[Path]:
    """train-N.tfr, valid-N.tfr and test-N.tfr of contact maps."""
    folder = first_of([data / "contact_map_prediction" / "targets", data / "contact_map_prediction"],
                      "the directory of contact maps", where)
    return [path for split in SPLITS for path in _parts(folder, split, where)]


def contacts(task: Task, paths: list[Path]) -> Iterator[Example]:
    """Sequences with the contacts of one kind of cells, float16 [pairs], row by row of the upper triangle."""
    column, bases = CELLS.index(task.name.rpartition("/")[2]), CONTACT_BINS * 2048
    for path in paths:
        for number, features in enumerate(records(path)):
            where = f"{path}: record {number + 1}"
            target = array_of(features, "target", "<f2", len(CELLS), where)
            one_hot = array_of(features, "sequence", "u1", 4, where)
            if len(target) != CONTACTS or len(one_hot) != bases:
                raise DataError(f"{where}: has {len(one_hot):,} bases and {len(target):,} contacts, and a contact map "
                                f"has {bases:,} and {CONTACTS:,}: copy or download the file again")
            yield Example(f"{path.stem}/{number}", bases_of(one_hot), "", where, path.name.partition("-")[0],
                          values=Values(np.ascontiguousarray(target[:, column]), where))


def activity_files(task: Task, data: Path, where: str) -> list[Path]:
    """sequences.bed, statistics.json, the genome, and the records of each split."""
    organism = task.name.rpartition("/")[2]
    base = first_of([data / "regulatory_sequence_activity_prediction" / organism, data / "data" / organism,
                     data / organism], f"the directory of {task.name}", where)
    bed = first_of([base / "sequences.bed"], f"the windows of {task.name}", where)
    statistics = first_of([base / "statistics.json"], f"the sizes of {task.name}", where)
    name = {"human": "hg38.ml.fa", "mouse": "mm10.ml.fa"}[organism]
    genome = first_of([folder / f"{name}{packed}" for folder in (base / "seqs", base, data) for packed in ("", ".gz")],
                      f"the genome of {task.name}", where)
    folder = first_of([base / "tfrecords"], f"the records of {task.name}", where)
    return [bed, statistics, genome, *(path for split in SPLITS for path in _parts(folder, split, where))]


def activity(paths: list[Path]) -> Iterator[Example]:
    """Windows, each about the middle of its row of the BED and filled with N past its contig, with float16 [bins,
    tracks] of the bins in its middle."""
    bed, statistics, genome, *parts = paths
    tracks = _tracks(statistics)
    targets = {split: _targets([path for path in parts if path.name.startswith(f"{split}-")], tracks)
               for split in SPLITS}
    # Rows and records have one order, which is not that of the contigs: the genome is held.
    contigs = {contig.name: contig.bases for contig in read_contigs([Source(genome)])}
    for row in _rows(bed):
        if row.contig not in contigs:
            raise DataError(f"{row.where}: contig {row.contig!r} is not in {genome}: is it the right genome?")
        values = next(targets[row.split], None)
        if values is None:
            raise DataError(f"{row.where}: there are fewer records of {row.split} than rows: they are of two versions")
        yield Example(row.name, filled(contigs[row.contig], row.start, row.end), "", row.where, row.split, row.contig,
                      Values(values, row.where))
    for split in SPLITS:
        if next(targets[split], None) is not None:
            raise DataError(f"{bed}: has fewer rows of {split} than there are records: they are of two versions")


def _tracks(path: Path) -> int:
    """Their number.

    Raises:
        DataError: the sizes are not those of the task.
    """
    try:
        said = read_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): copy or download it again") from None
    if said.get("target_length") != ACTIVITY_BINS or said.get("pool_width") != 128:
        raise DataError(f"{path}: says target_length {said.get('target_length')} and pool_width "
                        f"{said.get('pool_width')}, which are {ACTIVITY_BINS} and 128 in this suite")
    tracks = said.get("num_targets")
    if type(tracks) is not int or tracks < 1:
        raise DataError(f"{path}: num_targets is {tracks!r}, no number of tracks: copy or download it again")
    return tracks


def _targets(parts: list[Path], tracks: int) -> Iterator[np.ndarray]:
    for path in parts:
        for number, features in enumerate(records(path)):
            found = array_of(features, "target", "<f2", tracks, f"{path}: record {number + 1}")
            if len(found) != ACTIVITY_BINS:
                raise DataError(f"{path}: record {number + 1}: has {len(found):,} bins, not {ACTIVITY_BINS}: copy or "
                                "download the file again")
            yield found


def _rows(bed: Path) -> list[Interval]:
    """The windows about the middles of the rows, in order."""
    found = []
    for line, fields in text_rows(bed):
        where = f"{bed}: line {line}"
        if len(fields) < 4 or fields[3] not in SPLITS or not all(
                re.fullmatch("[0-9]{1,18}", number) for number in fields[1:3]):
            raise DataError(f"{where}: must be contig, start, end, and train, valid or test: copy or download the file "
                            "again")
        middle = (int(fields[1]) + int(fields[2])) // 2
        start = middle - ACTIVITY_WINDOW // 2
        found.append(Interval(fields[0], start, start + ACTIVITY_WINDOW, "", fields[3], where))
    return found
