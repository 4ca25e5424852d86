"""The files of a task as `hyena-dist finetune` takes them: train, dev and test, whatever form its publisher chose."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyena_dist.config.digests import file_sha256, json_sha256
from hyena_dist.config.errors import ConfigError
from hyena_dist.data.errors import DataError
from hyena_dist.runtime.files import writing
from hyena_dist.tasks.made_of import read_found
from hyena_dist.tasks.suites.description import Suite, Task
from hyena_dist.tasks.suites.writer import FILES, Writer, thin

TABLE, SOURCE = "table", "source.json"


@dataclass(frozen=True)
class Prepared:
    """What a task's files hold."""

    sizes: Mapping[str, int]
    """Sequences of each split that there is: train, valid, test."""
    longest: int
    classes: tuple[str, ...]
    """Labels of the training sequences, at most ten of them, for a person to look at."""
    notes: tuple[str, ...]


def look(suite: Suite, task: Task, data: Path) -> Prepared:
    """Read the files of a task and write nothing.

    Raises:
        DataError: they are missing, damaged, or hold something else than the task.
    """
    return _read(suite, task, suite.files(task, data))


def prepare(suite: Suite, task: Task, data: Path, directory: Path, most: int | None = None) -> Prepared:
    """Make directory/table of the files of a task, unless an earlier start has.

    Args:
        most: training sequences that are kept, drawn at random, the same in every start; None: all.

    Raises:
        DataError: as `look`.
        ConfigError: the files are others than those that the table was made of.
        OSError: it cannot be written.
    """
    paths = suite.files(task, data)
    table, made_of = directory / TABLE, {"files": _fingerprint(paths), "window": task.window, "most": most}
    if table.is_dir():
        said = read_found(table / SOURCE, f"remove {directory} to run {task.name} anew")
        if any(said.get(key) != value for key, value in made_of.items()):
            raise ConfigError(f"{table}: was made of other files than those of {task.name} under {data}, or with "
                              f"another --length or --most: give another --out, or remove {directory} to run it anew")
        found = _prepared(said)
        _check_splits(suite, task, paths, found.sizes, found.notes)
        return found
    aside = directory / f"{TABLE}.tmp"
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with Writer(aside) as writer:
            found = _read(suite, task, paths, writer)
        if most is not None and found.sizes["train"] > most:
            found = replace(found, sizes={**found.sizes, "train": most}, notes=(*found.notes, thin(aside, most)))
        content = {**made_of, "sizes": dict(found.sizes), "longest": found.longest,
                   "classes": list(found.classes), "notes": list(found.notes)}
        (aside / SOURCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, table)
    return found


def _prepared(said: Mapping[str, Any]) -> Prepared:
    return Prepared(said["sizes"], said["longest"], tuple(said["classes"]), tuple(said["notes"]))


def _read(suite: Suite, task: Task, paths: list[Path], writer: Writer | None = None) -> Prepared:
    """Read every sequence and, where there is a writer, hand it on."""
    sizes, classes, notes = Counter[str](), Counter[str](), list[str]()
    longest = cropped = 0
    for example in suite.read(task, paths, notes):
        bases = example.bases[: task.crop]
        cropped += len(bases) < len(example.bases)
        longest = max(longest, len(bases))
        sizes[example.split] += 1
        if example.split == "train" and len(classes) < 1000:
            classes[example.label] += 1
        if writer is not None:
            writer.write(example, bases)
    _check_splits(suite, task, paths, sizes, notes)
    if cropped:
        notes.append(f"{cropped:,} of {sum(sizes.values()):,} sequences were longer than {task.crop} bases, and their "
                     "beginning was kept, as the protocol says")
    of_split = {split: sizes[split] for split in FILES if sizes[split]}
    return Prepared(of_split, longest, tuple(sorted(classes)[:10]), tuple(notes))


def _check_splits(suite: Suite, task: Task, paths: list[Path], sizes: Mapping[str, int], notes: Sequence[str]) -> None:
    """Raises DataError: there are no sequences of a split that the protocol needs. Of what was left out of the files
    the notes tell."""
    for split in task.splits:
        if not sizes.get(split):
            raise DataError(f"{paths[0].parent}: the files of {task.name} give no sequences of {split}, without which "
                            f"it is not the protocol of {suite.name}: {'; '.join(notes) or suite.where}")


def _fingerprint(paths: list[Path]) -> list[list[str]]:
    """Name and digest of each file or directory: a copy has other times, and where the directory above is mounted may
    differ from one machine to the next."""
    return [[path.name, json_sha256({str(place.relative_to(path)): _digest(place)
                                     for place in ([path] if path.is_file() else sorted(path.rglob("*")))
                                     if place.is_file()})] for path in paths]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_sha256(file)
