"""The Genomics Long-Range Benchmark of InstaDeep (LRB): tables of places, and hg38 and hg19, out of which a window of
any length is cut around each. Its loader drops windows that reach past a contig, so longer ones are judged on fewer
places: how many there were is said."""

import ast
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hyena_dist.config.errors import one_line
from hyena_dist.data.errors import DataError
from hyena_dist.data.places import Values
from hyena_dist.data.tables import Example, reverse_complement
from hyena_dist.tasks.suites.description import Suite, Task, first_of
from hyena_dist.tasks.suites.rows import Interval, cut, table_rows, whole_number

WHERE = ("its authors publish it at https://huggingface.co/datasets/InstaDeepAI/genomics-long-range-benchmark; give "
         "the clone as --data, with hg38.fa.gz and hg19.fa.gz of https://hgdownload.soe.ucsc.edu in it")
_TABLES = {
    "regulatory_element_promoter": ("regulatory_elements/promoter_dataset", "hg38"),
    "regulatory_element_enhancer": ("regulatory_elements/enhancer_dataset", "hg38"),
    "chromatin_features_histone_marks": ("chromatin_features/histones_and_dnase", "hg19"),
    "chromatin_features_dna_accessibility": ("chromatin_features/histones_and_dnase", "hg19"),
    "variant_effect_causal_eqtl": ("variant_effect_causal_eqtl/All_Tissues", "hg38"),
    "variant_effect_pathogenic_clinvar": ("variant_effect_pathogenic/vep_pathogenic_coding", "hg38"),
    "variant_effect_pathogenic_omim": ("variant_effect_pathogenic/vep_pathogenic_non_coding", "hg38"),
    "bulk_rna_expression": ("bulk_rna_expression/gene_coordinates", "hg19"),
    "cage_prediction": ("cage_prediction/sequences_coordinates", "hg38"),
}
_NUMBERS = {"bulk_rna_expression": ("rna_expression_values.csv",), "cage_prediction": ("targets_subset",)}
"""Files beside the table, with the numbers of its rows."""
_VECTORS = {"chromatin_features_histone_marks": "HISTONES", "chromatin_features_dna_accessibility": "DNASE"}
"""Columns that hold a list of 0 and 1 for each place."""


def files(task: Task, data: Path) -> list[Path]:
    """The table of a task, whole or the subset that comes with it, its genome, and of some the files of its numbers."""
    stem, assembly = _TABLES[task.name]
    table = first_of([data / f"{stem}{ending}" for ending in (".csv", "_subset.csv", ".csv.gz", "_subset.csv.gz")],
                     f"the table of {task.name}", WHERE)
    genome = first_of([folder / f"{assembly}{ending}" for folder in (data, data / "genomes")
                       for ending in (".fa.gz", ".fa", ".2bit")], f"the genome {assembly} of {task.name}", WHERE)
    more = [first_of([table.parent / name], f"the file of numbers of {task.name}", WHERE)
            for name in _NUMBERS.get(task.name, ())]
    return [table, genome, *more]


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`. Each window has its place, or the middle of its stretch, in its own middle, as the
    suite's loader cuts it."""
    table, genome, *more = paths
    find = {"bulk_rna_expression": _genes, "cage_prediction": _tracks}.get(task.name)
    intervals = find(task, table) if find else _places(task, table)
    values = _rows_of_numbers(more[0], table, len(intervals)) if task.name == "bulk_rna_expression" else None
    arrays = _Arrays(more[0], task) if task.name == "cage_prediction" else None
    given: Counter[str] = Counter()
    for interval, bases in cut(intervals, genome, outside="drop"):
        given[interval.split] += 1
        example = Example(interval.name, reverse_complement(bases) if interval.reverse else bases, interval.label,
                          interval.where, interval.split, interval.contig)
        if values is not None:
            example = replace(example, label="", values=Values(values[int(interval.label)][None], interval.where))
        elif arrays is not None:
            example = replace(example, label="", values=Values(arrays.of(interval), interval.where))
        yield example
    if lost := sorted({interval.split for interval in intervals} - given.keys()):
        raise DataError(f"{table}: every window of {task.window:,} bases of {' and of '.join(lost)} reaches past its "
                        "contig, and would be left out, as the suite's loader does: take a shorter --length")
    if left_out := len(intervals) - given.total():
        notes.append(f"{left_out:,} of {len(intervals):,} windows reach past their contig and are left "
                     "out, as the suite's loader does: results of other lengths are of other places")


def _genes(task: Task, table: Path) -> list[Interval]:
    """Windows around the starts of genes, of their strand; the label of each is the number of its row."""
    assert task.window is not None
    found = []
    columns = ("chrom", "CAGE_representative_TSS", "strand", "split")
    for number, (where, values) in enumerate(table_rows(table, columns)):
        start, stop = _window(whole_number(values, "CAGE_representative_TSS", where) - 1, None, task.window)
        if values["strand"] not in ("+", "-"):
            raise DataError(f"{where}: strand {values['strand']!r} must be + or -: copy or download the file again")
        found.append(Interval(values["chrom"], start, stop, str(number), _split(values, where), where,
                              reverse=values["strand"] == "-"))
    return found


def _rows_of_numbers(path: Path, table: Path, rows: int) -> np.ndarray:
    """float32 [rows, columns] of a table that is nothing but numbers under a header."""
    found: list[list[float]] = []
    for where, values in table_rows(path, ()):
        try:
            found.append([float(value) for value in values.values()])
        except ValueError as error:
            raise DataError(f"{where}: holds something else than numbers ({error}): copy or download it "
                            "again") from None
    if len(found) != rows:
        raise DataError(f"{path}: has {len(found):,} rows, and {table.name} has {rows:,}: they are of two versions")
    return np.array(found, dtype=np.float32)


def _tracks(task: Task, table: Path) -> list[Interval]:
    """Windows around the stretches of the CAGE tracks; the label of each is its number in the files of arrays."""
    assert task.window is not None
    if task.window % 256 or task.window > _CAGE_WINDOW:
        raise DataError(f"--length {task.window}: windows of {task.name} are at most {_CAGE_WINDOW:,} bases, and a "
                        "multiple of 256: take another length")
    found = []
    for where, values in table_rows(table, ("chrom", "start", "stop", "split", "npy_idx")):
        first, end = (whole_number(values, column, where) - 1 for column in ("start", "stop"))
        start, stop = _window(first, end, task.window)
        number = whole_number(values, "npy_idx", where)
        found.append(Interval(values["chrom"], start, stop, str(number), _split(values, where), where))
    return found


class _Arrays:
    """The tracks in targets_subset/targets-SPLIT-FIRST-LAST.npz, of which some stay open."""

    def __init__(self, folder: Path, task: Task) -> None:
        assert task.window is not None
        self._bins = task.window // 128
        self._ranges = []
        for path in sorted(folder.glob("targets-*.npz")):
            match = re.fullmatch(r"targets-([a-z]+)-([0-9]{1,18})-([0-9]{1,18})[.]npz", path.name)
            if match is None:
                raise DataError(f"{path}: is not called targets-SPLIT-FIRST-LAST.npz as the others are: remove it, or "
                                "give it its name again")
            self._ranges.append((match[1], int(match[2]), int(match[3]), path))
        if not self._ranges:
            raise DataError(f"{folder}: holds no targets-SPLIT-FIRST-LAST.npz: {WHERE}")
        self._open = lru_cache(maxsize=8)(self._load)

    def of(self, interval: Interval) -> np.ndarray:
        """float32 [bins, tracks], logarithms of 1 + counts as the suite's loader has them, of the middle bins."""
        number = int(interval.label)
        path = next((path for split, first, last, path in self._ranges
                     if split == interval.split and first <= number <= last), None)
        name = f"target-{interval.split}-{number}.npy"
        arrays = self._open(path) if path is not None else {}
        array = arrays.get(name, arrays.get(name.removesuffix(".npy")))
        if array is None:
            raise DataError(f"{interval.where}: the array {name} is in none of the files "
                            f"targets-{interval.split}-*.npz: {WHERE}")
        array = np.asarray(array)
        array = array[0] if array.ndim == 3 else array
        if array.ndim != 2 or array.dtype.kind not in "iuf" or len(array) != _CAGE_WINDOW // 128:
            raise DataError(f"{path}: {name} is an array of {list(array.shape)}, and must be of 896 bins by tracks: "
                            "copy or download the file again")
        cut_off = (len(array) - self._bins) // 2
        return np.log1p(array[cut_off : cut_off + self._bins].astype(np.float32))

    @staticmethod
    def _load(path: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(path) as held:
                return {name if name.endswith(".npy") else f"{name}.npy": held[name] for name in held.files}
        except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: is damaged ({one_line(error)}): copy or download it again") from None


def _split(values: dict[str, str], where: str) -> str:
    if values["split"] not in ("train", "validation", "valid", "test"):
        raise DataError(f"{where}: split {values['split']!r} must be train, validation or test")
    return "valid" if values["split"].startswith("valid") else values["split"]


def _places(task: Task, table: Path) -> list[Interval]:
    """1-based places; their windows are half-open, 0-based."""
    column = _VECTORS.get(task.name)
    columns = ("CHROM", "POS", column, "split") if column else ("CHROM", "START", "STOP", "label", "split")
    found = []
    for where, values in table_rows(table, columns):
        first = whole_number(values, columns[1], where) - 1
        end = None if column else whole_number(values, "STOP", where) - 1
        if end is not None and end <= first:
            raise DataError(f"{where}: STOP {values['STOP']} is not behind START {values['START']}: copy or download "
                            "the file again")
        assert task.window is not None
        start, stop = _window(first, end, task.window)
        label = _vector(values[column], where) if column else values["label"].strip()
        if not label:
            raise DataError(f"{where}: has no label: copy or download the file again")
        found.append(Interval(values["CHROM"], start, stop, label, _split(values, where), where))
    return found


def _window(first: int, end: int | None, length: int) -> tuple[int, int]:
    """`length` bases around a place, or around the stretch up to `end`."""
    middle = first if end is None else first + (end - first) // 2
    start = middle - length // 2
    return start, start + length


def _vector(text: str, where: str) -> str:
    """The classes of a list as [0, 1, 1], by their numbers; "-": none."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not values or any(value not in (0, 1) for value in values):
        raise DataError(f"{where}: {text[:40]!r} is no list of 0 and 1: copy or download the file again")
    return ";".join(str(number) for number, value in enumerate(values) if value) or "-"


_WINDOW, _CAGE_WINDOW = 2048, 896 * 128
_SEVERAL = {"finetune.task": "multilabel"}
_PAIR = "a head for pairs of sequences, the one with the variant and the one without"


LRB = Suite(
    name="lrb",
    protocol="the published train and test places, validation places where there are, else a random tenth of train; "
             "windows of the task's length; weights by the validation loss; 3 seeds",
    differs="the suite leaves the length of a window to its user: it is here 2,048 bases, of CAGE 114,688, unless "
            "--length says otherwise, and results of other lengths are not comparable",
    where=WHERE,
    tasks=(
        Task(name="regulatory_element_promoter", metric="auprc", window=_WINDOW),
        Task(name="regulatory_element_enhancer", metric="auprc", window=_WINDOW),
        Task(name="chromatin_features_histone_marks", metric="auprc", window=_WINDOW, keys=_SEVERAL),
        Task(name="chromatin_features_dna_accessibility", metric="auprc", window=_WINDOW, keys=_SEVERAL),
        Task(name="variant_effect_causal_eqtl", metric="auroc", lacks=_PAIR),
        Task(name="variant_effect_pathogenic_clinvar", metric="auroc", lacks=_PAIR),
        Task(name="variant_effect_pathogenic_omim", metric="auprc", lacks=_PAIR),
        Task(name="bulk_rna_expression", metric="pearson", window=_WINDOW, keys={  # a window is one bin, of 218 numbers
            "finetune.task": "binned", "finetune.bin_size": _WINDOW}),
        Task(name="cage_prediction", metric="pearson", window=_CAGE_WINDOW, keys={
            "finetune.task": "binned", "finetune.bin_size": 128}),
    ),
    keys={"finetune.task": "classification", "finetune.pooling": "mean", "finetune.rc": "none", "finetune.seeds": 3,
          "finetune.epochs": 10, "train.global_batch_size": 32, "optim.lr": 6e-4, "optim.weight_decay": 0.1},
    grid={}, files=files, read=read)
