"""The Genomics Long-Range Benchmark of InstaDeep (LRB): tables of places, and hg38 and hg19, out of which a window of
any length is cut around each. Its loader drops windows that reach past a contig, so longer ones are judged on fewer
places: how many there were is said."""

import ast
from collections.abc import Iterator
from pathlib import Path

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example
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
_VECTORS = {"chromatin_features_histone_marks": "HISTONES", "chromatin_features_dna_accessibility": "DNASE"}
"""Columns that hold a list of 0 and 1 for each place."""


def files(task: Task, data: Path) -> list[Path]:
    """The table of a task, whole or the subset that comes with it, and its genome."""
    stem, assembly = _TABLES[task.name]
    table = first_of([data / f"{stem}{ending}" for ending in (".csv", "_subset.csv", ".csv.gz", "_subset.csv.gz")],
                     f"the table of {task.name}", WHERE)
    genome = first_of([folder / f"{assembly}{ending}" for folder in (data, data / "genomes")
                       for ending in (".fa.gz", ".fa", ".2bit")], f"the genome {assembly} of {task.name}", WHERE)
    return [table, genome]


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`. Each window has its place, or the middle of its stretch, in its own middle, as the
    suite's loader cuts it."""
    table, genome = paths
    intervals = _places(task, table)
    given = 0
    for interval, bases in cut(intervals, genome, outside="drop"):
        given += 1
        yield Example(interval.name, bases, interval.label, interval.where, interval.split, interval.contig)
    if given < len(intervals):
        notes.append(f"{len(intervals) - given:,} of {len(intervals):,} windows reach past their contig and are left "
                     "out, as the suite's loader does: results of other lengths are of other places")


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
        if values["split"] not in ("train", "validation", "valid", "test"):
            raise DataError(f"{where}: split {values['split']!r} must be train, validation or test")
        assert task.window is not None
        start, stop = _window(first, end, task.window)
        label = _vector(values[column], where) if column else values["label"].strip()
        if not label:
            raise DataError(f"{where}: has no label: copy or download the file again")
        split = "valid" if values["split"].startswith("valid") else values["split"]
        found.append(Interval(values["CHROM"], start, stop, label, split, where))
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
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not values or any(value not in (0, 1) for value in values):
        raise DataError(f"{where}: {text[:40]!r} is no list of 0 and 1: copy or download the file again")
    return ";".join(str(number) for number, value in enumerate(values) if value) or "-"


_WINDOW = 2048
_SEVERAL = {"finetune.task": "multilabel"}
_PAIR = "a head for pairs of sequences, the one with the variant and the one without"


LRB = Suite(
    name="lrb",
    protocol="the published train and test places, validation places where there are, else a random tenth of train; "
             "windows of the task's length; weights by the validation loss; 3 seeds",
    differs="the suite leaves the length of a window to its user: it is here 2,048 bases unless --length says "
            "otherwise, and results of other lengths are not comparable",
    where=WHERE,
    tasks=(
        Task(name="regulatory_element_promoter", metric="auprc", window=_WINDOW),
        Task(name="regulatory_element_enhancer", metric="auprc", window=_WINDOW),
        Task(name="chromatin_features_histone_marks", metric="auprc", window=_WINDOW, keys=_SEVERAL),
        Task(name="chromatin_features_dna_accessibility", metric="auprc", window=_WINDOW, keys=_SEVERAL),
        Task(name="variant_effect_causal_eqtl", metric="auroc", lacks=_PAIR),
        Task(name="variant_effect_pathogenic_clinvar", metric="auroc", lacks=_PAIR),
        Task(name="variant_effect_pathogenic_omim", metric="auprc", lacks=_PAIR),
        Task(name="bulk_rna_expression", metric="pearson", lacks="a head of 218 numbers for a sequence"),
        Task(name="cage_prediction", metric="pearson", lacks="a reader of its tracks in .npz files"),
    ),
    keys={"finetune.task": "classification", "finetune.pooling": "mean", "finetune.rc": "none", "finetune.seeds": 3,
          "finetune.epochs": 10, "train.global_batch_size": 32, "optim.lr": 6e-4, "optim.weight_decay": 0.1},
    grid={}, files=files, read=read)
