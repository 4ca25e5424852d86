"""The downstream tasks of the Nucleotide Transformer (Dalla-Torre et al.), as Caduceus runs them.

There are two collections of 18 tasks, and they are not comparable: the original one, with marks of yeast, which
HyenaDNA and Caduceus report; and the revised one of the published paper, with marks of human K562 cells. They have
tasks of the same names, so a directory is only taken for the one that its name or its tasks show it to be.
"""

from collections.abc import Iterator
from pathlib import Path

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Columns, Example, read_table
from hyena_dist.tasks.suites.description import MissingFiles, Published, Suite, Task
from hyena_dist.tasks.suites.rows import FASTAS, TABLES, example_of, table_rows, with_ending

_REPOSITORIES = {"original": "nucleotide_transformer_downstream_tasks",
                 "revised": "nucleotide_transformer_downstream_tasks_revised"}
WHERE = ("its authors publish it at https://huggingface.co/datasets/InstaDeepAI/" + _REPOSITORIES["original"] +
         " and ..._revised; clone one or both into --data, without changing their names")
_SPLITS = ("train", "test")

_YEAST = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
_HUMAN = ("H2AFZ", "H3K27ac", "H3K27me3", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K9ac", "H3K9me3", "H4K20me1")
_OTHERS = ("enhancers", "enhancers_types", "promoter_all", "promoter_no_tata", "promoter_tata",
           "splice_sites_acceptors", "splice_sites_donors", "splice_sites_all")
_ONLY_IN = {"original": set(_YEAST) - set(_HUMAN), "revised": set(_HUMAN) - set(_YEAST)}
"""Tasks that show which collection a directory is."""


def files(task: Task, data: Path) -> list[Path]:
    """The files of a task: TASK/train.fna and TASK/test.fna, or tables, or one table for all tasks with the column
    `task`, as the revised collection has it."""
    kind, _, name = task.name.partition("/")
    for place in (data / _REPOSITORIES[kind], data / kind, data):
        if not place.is_dir() or (place == data and not _is_of(kind, data)):
            continue
        _refuse_the_other(kind, place)
        found = [with_ending(place / name / split, (*FASTAS, *TABLES)) for split in _SPLITS]
        if not any(found):
            for base in (place / "data", place):
                found = [with_ending(base / split, TABLES) for split in _SPLITS]
                if any(found):
                    break
        if all(found):
            return [path for paths in found for path in paths]
        if any(found):
            lacks = _SPLITS[0 if not found[0] else 1]
            raise MissingFiles(f"{place / name / lacks}.fna: the {lacks} file of {task.name} is not there",
                               WHERE)
    raise MissingFiles(f"{data / _REPOSITORIES[kind] / name / 'train'}.fna: {task.name} is not there", WHERE)


def _is_of(kind: str, data: Path) -> bool:
    """Whether the directory itself is a collection of this kind."""
    if data.name in (*_REPOSITORIES.values(), *_REPOSITORIES):
        return data.name in (_REPOSITORIES[kind], kind)
    return any((data / name).is_dir() for name in _ONLY_IN[kind])


def _refuse_the_other(kind: str, place: Path) -> None:
    """Raises DataError: a directory holds tasks of the other collection, too."""
    [other] = set(_ONLY_IN) - {kind}
    if both := sorted(name for name in _ONLY_IN[other] if (place / name).is_dir()):
        raise DataError(f"{place}: holds {both[0]}, which is of the {other} collection alone: the two have tasks of "
                        f"the same names that are not comparable: keep them in {_REPOSITORIES['original']} and "
                        f"{_REPOSITORIES['revised']}")


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`. Of FASTA the label is the whole last `|` field, which may have two digits."""
    del notes
    name, found = task.name.partition("/")[2], 0
    for path in paths:
        split = "train" if path.name.startswith("train") else "test"
        if path.name.endswith(FASTAS):
            for example in read_table(path, Columns()):
                found += 1
                yield Example(example.name, example.bases, example.label, example.where, split)
            continue
        for where, values in table_rows(path, ("sequence", "label")):
            if values.get("task", name) == name:
                found += 1
                yield example_of(values, where, split)
    if not found:
        raise DataError(f"{paths[0]}: no row has {name!r} in its column `task`: is it the other collection?")


def _tasks(kind: str, marks: tuple[str, ...]) -> tuple[Task, ...]:
    """Metrics as Caduceus has them: MCC of histone marks and enhancers, F1 of promoters, donors and acceptors, accuracy
    of all splice sites."""
    metrics = {name: "mcc" for name in (*marks, "enhancers", "enhancers_types")}
    metrics |= {"splice_sites_all": "accuracy"}
    return tuple(Task(name=f"{kind}/{name}", metric=metrics.get(name, "f1")) for name in (*marks, *_OTHERS))


def _original(marks: tuple[float, ...], others: tuple[float, ...]) -> dict[str, float]:
    return dict(zip((f"original/{name}" for name in (*_YEAST, *_OTHERS)), (*marks, *others), strict=True))


CADUCEUS = Suite(
    name="caduceus-nt",
    protocol="what Caduceus calls 10-fold cross-validation: seeds 1 to 10, each with a random 90:10 split of the train "
             "part; 20 epochs, cosine with 1 % of warm-up, weight decay 0.1; batch of 128 or 512, chosen on the "
             "validation parts; MCC, F1 or accuracy by task on the test part, read once for each seed; the original "
             "and the revised collection are different tasks, also where they have one name",
    differs="learning rate 6e-4, as Caduceus has it for HyenaDNA elsewhere, not its own 1e-3 and 2e-3; weights are "
            "kept by the validation loss; HyenaDNA's own numbers are of other splits, chosen on test",
    where=WHERE, tasks=(*_tasks("original", _YEAST), *_tasks("revised", _HUMAN)),
    keys={"finetune.task": "classification", "finetune.pooling": "mean", "finetune.rc": "none", "train.seed": 1,
          "finetune.seeds": 10, "finetune.valid_fraction": 0.1, "finetune.epochs": 20, "optim.lr": 6e-4,
          "optim.weight_decay": 0.1},
    grid={"train.global_batch_size": (128, 512)}, files=files, read=read,
    published=(
        Published(model="HyenaDNA (2x256)", source="Nguyen et al. 2023, arXiv 2306.15794, Table 4.2", values=_original(
            (.817, .663, .653, .571, .539, .612, .716, .651, .796, .637),
            (.626, .557, .965, .966, .967, .966, .973, .979))),
        Published(model="NT-2.5B multi-species", source="the same table", values=_original(
            (.814, .550, .632, .559, .326, .421, .642, .575, .822, .501),
            (.580, .474, .974, .977, .964, .990, .984, .983))),
        Published(model="JanusDNA", source="README of Qihao-Duan/JanusDNA", values={
            "original/H3": .835, "original/H3K4me3": .688, "original/enhancers": .559, "original/enhancers_types": .503,
            "original/promoter_all": .970, "original/splice_sites_all": .967})))
