"""What the labels of whole sequences say: names of classes, one or several of a row, or numbers."""

import math
import re
from collections import Counter
from dataclasses import replace

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import NO_LABEL, Example


def names_of_classes(splits: dict[str, list[Example]], task: str, notes: list[str]) -> list[str]:
    """The names of the training labels, sorted: as numbers where all are. What is odd in them is added to the notes.

    Raises:
        DataError: they are too few or too many for classes, or another split has one that training lacks.
    """
    seen = {name: Counter(label for example in examples for label in (
        several(example.label) if task == "multilabel" else [example.label])) for name, examples in splits.items()}
    classes = sorted(seen["train"], key=in_order)
    if len(classes) < (2 if task == "classification" else 1):
        raise DataError(f"finetune.table has training sequences of {len(classes)} class ({', '.join(classes)}): a "
                        "classifier needs two")
    if task == "classification" and len(classes) > max(10, len(splits["train"]) / 2):
        raise DataError(f"finetune.table has {len(classes)} different labels on {len(splits['train'])} training "
                        "sequences: set finetune.task=regression where they are numbers, or name another "
                        "finetune.label_column")
    notes += _alike(classes)
    for name, counts in seen.items():
        if unknown := sorted(set(counts) - set(classes), key=in_order):
            example = next(e for e in splits[name] if unknown[0] in (
                several(e.label) if task == "multilabel" else [e.label]))
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


def name_vectors(splits: dict[str, list[Example]], notes: list[str]) -> None:
    """Several labels of each row may be a vector of 0 and 1, one for each class; then they are named by their places.
    Such vectors are known by their one length and by a value that comes twice in a row.

    Raises:
        DataError: a row has a label twice, and is no such vector.
    """
    rows = [several(example.label) for examples in splits.values() for example in examples]
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
            str(place) for place, word in enumerate(several(example.label)) if number_of(word)) or NO_LABEL)
            for example in examples]
    notes.append(f"labels are vectors of {len(rows[0])} numbers, 0 or 1: class n is the n-th, counted from 0")


def number_of(text: str) -> float | None:
    """The finite number that a text is, as people write it; None: it is none."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or math.isinf(found := float(text)):
        return None
    return found


def several(label: str) -> list[str]:
    """The labels of a row; a dash stands for none."""
    return [] if label == NO_LABEL else [word.strip() for word in label.split(";") if word.strip()]


def in_order(label: str) -> tuple[float, str]:
    """A key by which labels are sorted: numbers by value, then names."""
    return (int(label) if label.isascii() and label.isdigit() else math.inf, label)


def check_numbers(splits: dict[str, list[Example]]) -> None:
    """Raises DataError: a label is no number."""
    for examples in splits.values():
        for example in examples:
            if number_of(example.label) is None:
                raise DataError(f"{example.where}: the label {example.label!r} is no number: correct it, or set "
                                "finetune.task=classification")
