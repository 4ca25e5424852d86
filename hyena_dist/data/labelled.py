"""Labelled sequences as a model learns them: which are trained on, chosen by and judged on; labels as numbers; token
ids of true lengths."""

import hashlib
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np

from hyena_dist.config.sections.finetune import PLACES, FinetuneSection, words_of
from hyena_dist.data.errors import DataError
from hyena_dist.data.labels import check_numbers, in_order, name_vectors, names_of_classes, number_of, several
from hyena_dist.data.partition import (
    contradicting,
    copy_key,
    draw,
    homologous,
    move_chromosomes,
    overlapping,
    repeated,
    without_alike,
)
from hyena_dist.data.places import Places, classes_in, places_of
from hyena_dist.data.readable import crop, foreign
from hyena_dist.data.scale import Scale, scale_of
from hyena_dist.data.tables import Columns, Example, read_table, reverse_complement
from hyena_dist.data.tokenizer import Tokenizer

NAMES = ("train", "valid", "test")
_FILES = {"train": ("train",), "valid": ("dev", "valid", "val", "validation"), "test": ("test",)}
_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".fna", ".fna.gz", ".fa", ".fa.gz", ".fasta", ".fasta.gz",
            ".bed", ".bed.gz")


@dataclass(frozen=True)
class Labelled:
    """All the sequences of a task, in splits."""

    splits: dict[str, list[Example]]
    """Of train, valid and, where there is one, test."""
    classes: list[str]
    """Names of the classes, sorted; the class of number i is the i-th. Empty: labels are numbers."""
    task: str
    notes: list[str] = field(default_factory=list)
    """What is odd in them, a line each."""
    places: Places | None = None
    """What the labels are, where they belong to places of the sequences."""
    scale: Scale | None = None
    """Of the training labels, where they are numbers of places, or where a model has learnt numbers by it and those
    labels are not at hand."""

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a sequence, or for each of its places."""
        return len(self.classes) or (1 if self.places is None else self.places.tracks)

    def at_places(self, split: str, number: int) -> np.ndarray:
        """The labels of one sequence's places, as `Places.read` gives them.

        Raises:
            DataError: as of `Places.read`.
        """
        assert self.places is not None
        example = self.splits[split][number]
        return self.places.read(example.length, example.label, example.values, example.where)

    def targets(self, split: str) -> np.ndarray:
        """int64 [n] class numbers, float64 [n, classes] of 0 and 1, or float64 [n] numbers; of whole sequences."""
        examples = self.splits[split]
        place = {name: number for number, name in enumerate(self.classes)}
        if self.task == "classification":
            return np.array([place[example.label] for example in examples], dtype=np.int64)
        if self.task == "regression":
            return np.array([float(example.label) for example in examples])
        found = np.zeros((len(examples), len(self.classes)))
        for row, example in enumerate(examples):
            found[row, [place[name] for name in several(example.label)]] = 1
        return found

    def digest(self) -> str:
        """sha256 of every sequence, label and split."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Reads every label that is in a file, which takes its time where there are many."""
        found = hashlib.sha256()
        for name, examples in self.splits.items():
            for example in examples:
                found.update(f"{name}\t{example.label}\t".encode() + example.key)
                if example.values is not None:
                    found.update(example.values.digest())
        return found.hexdigest()


def read_labelled(section: FinetuneSection, *, seed: int, most: int) -> Labelled:
    """The sequences of a configuration, in splits.

    Args:
        seed: of the part for validation, where it is drawn.
        most: bases that the model takes.

    Raises:
        DataError: a file cannot be used, a split has no sequence, or a label does not fit the task.
    """
    return reader_of(section, most=most)(seed)


def reader_of(section: FinetuneSection, *, most: int) -> Callable[[int], Labelled]:
    """Reads the files once, and gives the sequences in the splits of each seed, as `read_labelled` does. The seeds
    differ only where a part for validation is drawn.

    Raises:
        DataError: a file cannot be used; the reader raises what `read_labelled` does of splits and labels.
    """
    given, notes = _given(_read(section), section), list[str]()
    if section.task == "multilabel":
        name_vectors(given, notes)
    notes += crop(given, section.longer, most, otherwise="set finetune.longer to left, center or right to keep that "
                  "part, or take a model of a longer context")
    notes += foreign(given)
    places = _checked_places(given, section) if section.task in PLACES else None
    notes += _contradicting(given, section)
    drawn, file = not given["valid"], None if section.homology is None else Path(section.homology)
    regions = [] if file is None else homologous(file, [example for found in given.values() for example in found])

    @lru_cache(1)  # it is asked for several times
    def of_part(seed: int) -> Labelled:
        splits = _drawn(given, section, seed) if drawn else given
        if file is None:
            return _parted(splits, section, notes, places)
        train, note = without_alike(splits, file, regions)
        return _parted({**splits, "train": train}, section, [*notes, note], places)

    return lambda seed: of_part(seed if drawn else 0)


def _parted(given: dict[str, list[Example]], section: FinetuneSection, notes: Sequence[str],
            places: Places | None) -> Labelled:
    """The sequences of all splits, each checked."""
    for name, wanted in (("train", "to train on"), ("valid", "to validate by")):
        if not given[name]:
            sizes = ", ".join(f"{len(examples):,} of {split}" for split, examples in given.items())
            raise DataError(f"finetune.table has no sequences {wanted} ({sizes}): give more, or finetune.valid")
    splits = {name: examples for name, examples in given.items() if examples}
    notes = [*notes, *repeated(splits, both_strands=section.rc != "none"), *overlapping(splits)]
    if places is not None:
        return _with_places(splits, section, notes, places)
    classes = [] if section.task == "regression" else names_of_classes(splits, section.task, notes)
    if section.task == "regression":
        check_numbers(splits)
    return Labelled(splits, classes, section.task, notes)


def _checked_places(given: dict[str, list[Example]], section: FinetuneSection) -> Places:
    """What the labels of places are; that every sequence has them is checked."""
    first = given["train"][0].values if given["train"] else None
    places = places_of(section, None if first is None else first.array().shape)
    for examples in given.values():
        for example in examples:
            places.check(example.length, example.label, example.values, example.where)
    return places


def _with_places(splits: dict[str, list[Example]], section: FinetuneSection, notes: list[str],
                 places: Places) -> Labelled:
    """Sequences whose places have labels."""
    if section.task != "per_base":
        return _with_scale(Labelled(splits, [], section.task, notes, places))
    counts, unknown = classes_in((e.label, e.values, e.where) for e in splits["train"])
    classes = sorted(counts, key=in_order)
    if unknown:
        notes.append(f"{unknown:,} of the training sequences' bases have no label, and are not scored")
    if len(classes) < 2:
        raise DataError(f"finetune.table has training sequences with bases of {len(classes)} class "
                        f"({', '.join(classes)}): a classifier needs two")
    for name, examples in splits.items():
        known = False
        for example in examples:
            seen, _ = classes_in([(example.label, example.values, example.where)])
            known |= bool(seen)
            if odd := sorted(set(seen) - set(classes), key=in_order):
                raise DataError(f"{example.where}: the label {odd[0]!r} of {name} is of no training sequence's "
                                f"base: the classes are {', '.join(classes)[:200]}")
        if not known:
            raise DataError(_NOTHING_KNOWN.format(name))
    return Labelled(splits, classes, section.task, notes, replace(places, classes=tuple(classes)))


_NOTHING_KNOWN = "finetune.table has sequences of {0} and no label of {0} that is known: nothing could be judged by it"


def _with_scale(labelled: Labelled) -> Labelled:
    """With the scale of its numbers.

    Raises:
        DataError: no label of a split is known, or a value cannot be used.
    """
    scale, notes = scale_of(partial(labelled.at_places, "train"), len(labelled.splits["train"]), labelled.outputs)
    for name, examples in labelled.splits.items():
        if all(np.isnan(labelled.at_places(name, number)).all() for number in range(len(examples))):
            raise DataError(_NOTHING_KNOWN.format(name))
    return replace(labelled, scale=scale, notes=[*labelled.notes, *notes])


def encoded(example: Example, tokenizer: Tokenizer, *, reverse: bool = False) -> np.ndarray:
    """Token ids of a sequence, or of its other strand."""
    return tokenizer.encode(reverse_complement(example.bases) if reverse else example.bases)


def _read(section: FinetuneSection) -> dict[str, list[Example]]:
    """By the name of a split, or "" of what no file has put into one."""
    if not section.table:
        raise DataError("finetune.table is missing: give the file of labelled sequences, or a directory with train, "
                        "dev and test")
    columns = Columns(section.sequence_column, section.label_column, section.split_column,
                      section.task if section.task in PLACES else "")
    genome = None if section.genome is None else Path(section.genome)
    table = Path(section.table)
    files = _in_directory(table) if table.is_dir() else {"": table}
    for name in ("valid", "test"):
        if (path := getattr(section, name)) is not None:
            if name in files:
                raise DataError(f"finetune.{name}: {files[name]} is of {name} already: leave one out, or name the file "
                                "that trains as finetune.table")
            files[name] = Path(path)
    found: dict[str, list[Example]] = {}
    for name, path in files.items():
        for example in read_table(path, columns, genome):
            if name and example.split not in ("", name):
                raise DataError(f"{example.where}: is of split {example.split}, in the file of {name}: put it where it "
                                "belongs, or remove the column")
            found.setdefault(name or example.split, []).append(example)
    return found


def _in_directory(directory: Path) -> dict[str, Path]:
    """The file of each split in a directory."""
    found = {}
    for split, names in _FILES.items():
        paths = [path for name in names for ending in _ENDINGS if (path := directory / (name + ending)).is_file()]
        if len(paths) > 1:
            raise DataError(f"{directory}: {paths[0].name} and {paths[1].name} are both of {split}: remove one, or "
                            "name the files with finetune.table, finetune.valid and finetune.test")
        if paths:
            found[split] = paths[0]
    if "train" not in found:
        raise DataError(f"{directory}: has no train{_ENDINGS[0]} (or {', '.join(_ENDINGS[1:])}): name the file itself "
                        "as finetune.table")
    return found


def _given(read: dict[str, list[Example]], section: FinetuneSection) -> dict[str, list[Example]]:
    """The splits that the tables or their chromosomes say; those that they do not say are empty."""
    splits = {name: read.get(name, []) for name in NAMES}
    splits["train"] = splits["train"] + read.get("", [])
    for name, listed in (("test", section.test_chromosomes), ("valid", section.valid_chromosomes)):
        if listed is not None:
            move_chromosomes(splits, name, words_of(listed))
    return splits


def _drawn(given: dict[str, list[Example]], section: FinetuneSection, seed: int) -> dict[str, list[Example]]:
    """With a part of the training sequences for validation."""
    train, valid = draw(given["train"], section.valid_fraction, seed, same=copy_key(both_strands=section.rc != "none"),
                        classes=partial(_classes_of, task=section.task))
    return {**given, "train": train, "valid": valid}


def _classes_of(example: Example, task: str) -> Collection[str]:
    """The classes that a sequence, or its bases, have; none where labels are numbers."""
    if task == "classification":
        return (example.label,)
    if task == "multilabel":
        return several(example.label)
    return classes_in([(example.label, example.values, example.where)])[0] if task == "per_base" else ()


def _contradicting(given: dict[str, list[Example]], section: FinetuneSection) -> list[str]:
    """A note on sequences with different labels."""
    def label(example: Example) -> Hashable:
        if example.values is not None:
            return example.values.digest()
        if section.task == "multilabel":
            return frozenset(several(example.label))
        return number_of(example.label) if section.task == "regression" else example.label

    # Labels of places are turned with the strand: there copies are of one strand alone.
    same = copy_key(both_strands=section.rc != "none" and section.task not in PLACES)
    return contradicting([example for examples in given.values() for example in examples], same, label)
