"""Labelled sequences as a model learns them: which are trained on, chosen by and judged on; labels as numbers; token
ids of true lengths."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from hyena_dist.config.sections.finetune import PLACES, FinetuneSection, words_of
from hyena_dist.data.errors import DataError
from hyena_dist.data.places import Places, classes_in, places_of
from hyena_dist.data.scale import Scale, scale_of
from hyena_dist.data.tables import NO_LABEL, Columns, Example, read_table, reverse_complement
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
    """Of the training labels, where they are numbers of places."""

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
            found[row, [place[name] for name in _several(example.label)]] = 1
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
    splits = _split(_read(section), section, seed)
    notes = _crop(splits, section, most)
    notes += _repeated(splits) + _foreign(splits)
    if section.task in PLACES:
        return _with_places(splits, section, notes)
    if section.task == "multilabel":
        _of_vectors(splits, notes)
    classes = [] if section.task == "regression" else _classes(splits, section.task, notes)
    if section.task == "regression":
        _check_numbers(splits)
    return Labelled(splits, classes, section.task, notes)


def _with_places(splits: dict[str, list[Example]], section: FinetuneSection, notes: list[str]) -> Labelled:
    """Sequences whose places have labels, each checked."""
    first = splits["train"][0].values
    places = places_of(section, None if first is None else first.array().shape)
    for examples in splits.values():
        for example in examples:
            places.check(example.length, example.label, example.values, example.where)
    if section.task != "per_base":
        return _with_scale(Labelled(splits, [], section.task, notes, places))
    counts, unknown = classes_in((e.label, e.values, e.where) for e in splits["train"])
    classes = sorted(counts, key=_order)
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
            if odd := sorted(set(seen) - set(classes), key=_order):
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


def _split(read: dict[str, list[Example]], section: FinetuneSection, seed: int) -> dict[str, list[Example]]:
    splits = {name: read.get(name, []) for name in NAMES}
    splits["train"] = splits["train"] + read.get("", [])
    for name, key in (("test", "test_chromosomes"), ("valid", "valid_chromosomes")):
        if (listed := getattr(section, key)) is not None:
            _move_chromosomes(splits, name, key, words_of(listed))
    if not splits["valid"]:
        _draw_valid(splits, section.valid_fraction, seed)
    if not splits["train"]:
        raise DataError(f"finetune.table has no sequences to train on: {len(splits['valid']):,} are for validation and "
                        f"{len(splits['test']):,} for the test: give more, or finetune.valid")
    return {name: examples for name, examples in splits.items() if examples or name != "test"}


def _move_chromosomes(splits: dict[str, list[Example]], name: str, key: str, listed: list[str]) -> None:
    if splits[name]:
        raise DataError(f"finetune.{key}: the tables say already which sequences are of {name}: leave it out")
    known = {example.chromosome for example in splits["train"]}
    for chromosome in listed:
        if chromosome not in known:
            raise DataError(f"finetune.{key}: no training sequence is of {chromosome!r}: there are "
                            f"{', '.join(sorted(filter(None, known)))[:200] or 'no intervals'}")
    splits[name] = [example for example in splits["train"] if example.chromosome in listed]
    splits["train"] = [example for example in splits["train"] if example.chromosome not in listed]


def _draw_valid(splits: dict[str, list[Example]], fraction: float, seed: int) -> None:
    """A random part of the training sequences; copies of one sequence stay together, so that none is on both sides."""
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(splits["train"]):
        groups.setdefault(example.key, []).append(number)
    wanted = max(1, round(fraction * len(splits["train"])))
    order = np.random.default_rng([seed, 0x7661]).permutation(len(groups))
    members = list(groups.values())
    drawn: set[int] = set()
    for group in order:
        if len(drawn) >= wanted:
            break
        drawn.update(members[group])
    splits["valid"] = [example for number, example in enumerate(splits["train"]) if number in drawn]
    splits["train"] = [example for number, example in enumerate(splits["train"]) if number not in drawn]


def _crop(splits: dict[str, list[Example]], section: FinetuneSection, most: int) -> list[str]:
    """Refuse or cut what is longer than the model."""
    cropped = 0
    for name, examples in splits.items():
        for number, example in enumerate(examples):
            over = example.length - most
            if over <= 0:
                continue
            if section.longer == "refuse":
                raise DataError(f"{example.where}: has {example.length:,} bases, and the model takes {most:,}: set "
                                "finetune.longer to left, center or right to keep that part, or take a model of a "
                                "longer context")
            first = {"left": 0, "center": over // 2, "right": over}[section.longer]
            examples[number] = example.part(first, most)
            cropped += 1
        splits[name] = examples
    return [f"{cropped:,} sequences were longer than {most:,} bases, and their {section.longer} part was kept"] * bool(
        cropped)


def _repeated(splits: dict[str, list[Example]]) -> list[str]:
    sets = {name: {example.key for example in examples} for name, examples in splits.items()}
    pairs = [("train", "test"), ("valid", "test"), ("train", "valid")]
    return [f"{count:,} different sequences are in {one} and in {other}: what is found there is too good"
            for one, other in pairs if one in sets and other in sets and (count := len(sets[one] & sets[other]))]


def _foreign(splits: dict[str, list[Example]]) -> list[str]:
    bases = letters = sequences = 0
    for examples in splits.values():
        for example in examples:
            odd = len(example.bases.translate(None, b"ACGTacgt"))
            bases, letters, sequences = bases + example.length, letters + odd, sequences + bool(odd)
    return [f"{letters:,} of {bases:,} bases, in {sequences:,} sequences, are no A, C, G or T: the model sees N or "
            "[UNK] there"] * bool(letters)


def _classes(splits: dict[str, list[Example]], task: str, notes: list[str]) -> list[str]:
    """The names of the training labels, sorted: as numbers where all are."""
    seen = {name: Counter(label for example in examples for label in (
        _several(example.label) if task == "multilabel" else [example.label])) for name, examples in splits.items()}
    classes = sorted(seen["train"], key=_order)
    if len(classes) < (2 if task == "classification" else 1):
        raise DataError(f"finetune.table has training sequences of {len(classes)} class ({', '.join(classes)}): a "
                        "classifier needs two")
    if task == "classification" and len(classes) > max(10, len(splits["train"]) / 2):
        raise DataError(f"finetune.table has {len(classes)} different labels on {len(splits['train'])} training "
                        "sequences: set finetune.task=regression where they are numbers, or name another "
                        "finetune.label_column")
    notes += _alike(classes)
    for name, counts in seen.items():
        if unknown := sorted(set(counts) - set(classes), key=_order):
            example = next(e for e in splits[name] if unknown[0] in (
                _several(e.label) if task == "multilabel" else [e.label]))
            raise DataError(f"{example.where}: the label {unknown[0]!r} of {name} is of no training sequence: the "
                            f"classes are {', '.join(classes)[:200]}")
        notes += [f"class {label!r} has no sequence in {name}" for label in classes if label not in counts]
    return classes


def _alike(classes: list[str]) -> list[str]:
    """Labels that are one number written twice, as 1 and 1.0."""
    numbers: dict[float, list[str]] = {}
    for name in classes:
        if (number := number_of(name)) is not None:
            numbers.setdefault(number, []).append(name)
    return [f"labels {' and '.join(map(repr, names))} are the same number, and classes of their own: write it one way"
            for names in numbers.values() if len(names) > 1]


def _of_vectors(splits: dict[str, list[Example]], notes: list[str]) -> None:
    """Several labels of each row may be a vector of 0 and 1, one for each class; then they are named by their places.
    Such vectors are known by their one length and by a value that comes twice in a row."""
    rows = [_several(example.label) for examples in splits.values() for example in examples]
    twice = [len(set(row)) < len(row) for row in rows]
    if not any(twice):
        if commas := sum(";" not in row.label and "," in row.label for examples in splits.values() for row in examples):
            notes.append(f"{commas:,} rows have one label with a comma in it: several labels are separated by ';'")
        return
    if len({len(row) for row in rows}) > 1 or any(number_of(word) not in (0, 1) for row in rows for word in row):
        example = [example for examples in splits.values() for example in examples][twice.index(True)]
        raise DataError(f"{example.where}: a label comes twice in {example.label[:80]!r}: name each once, separated by "
                        "';', or write a 0 or 1 for every class in every row")
    for name, examples in splits.items():
        splits[name] = [replace(example, label=";".join(
            str(place) for place, word in enumerate(_several(example.label)) if number_of(word)) or NO_LABEL)
            for example in examples]
    notes.append(f"labels are vectors of {len(rows[0])} numbers, 0 or 1: class n is the n-th, counted from 0")


def number_of(text: str) -> float | None:
    """The finite number that a text is, as people write it; None: it is none."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or math.isinf(found := float(text)):
        return None
    return found


def _several(label: str) -> list[str]:
    """The labels of a row; a dash stands for none."""
    return [] if label == NO_LABEL else [word.strip() for word in label.split(";") if word.strip()]


def _order(label: str) -> tuple[float, str]:
    return (int(label) if label.isascii() and label.isdigit() else math.inf, label)


def _check_numbers(splits: dict[str, list[Example]]) -> None:
    for examples in splits.values():
        for example in examples:
            if number_of(example.label) is None:
                raise DataError(f"{example.where}: the label {example.label!r} is no number: correct it, or set "
                                "finetune.task=classification")
