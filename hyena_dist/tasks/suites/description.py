"""What a suite of benchmarks is: its tasks, the protocol that they are run by, the reader of its files, and the numbers
that others have published for them. A suite is data; `tasks/suites/runner.py` runs any of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example

Keys = Mapping[str, object]
"""Values by `section.key` of a configuration."""


class MissingFiles(DataError):
    """The files of a task are not there.

    Args:
        what: the file, and what it is.
        where: the suite's authors publish it.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what}: {where}")
        self.what = what


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set of a suite."""

    name: str
    metric: str
    """By which the suite's authors judge it: one of `train.predictions.METRICS`."""
    keys: Keys = field(default_factory=dict)
    """Of this task alone."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where directories or files are called so."""
    crop: int | None = None
    """Bases of a sequence that the protocol keeps, from its beginning; None: all."""
    window: int | None = None
    """Bases that are cut out around each place, where the suite leaves that to its user; None: it does not."""
    splits: tuple[str, ...] = ("train", "test")
    """That its files must have; where valid is none of them and they have none, it is a random part of train."""
    lacks: str = ""
    """What this project cannot do yet and the task needs; the task is then listed and left out. "": it can be run."""

    def of_length(self, bases: int) -> "Task":
        """This task with windows of so many bases; a bin that is a whole window stays one."""
        keys = {key: bases if (key, value) == ("finetune.bin_size", self.window) else value
                for key, value in self.keys.items()}
        return replace(self, window=bases, keys=keys)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of somebody's table, to stand beside ours."""

    model: str
    source: str
    values: Mapping[str, float]
    """By task, in the units of its metric, from 0 to 1."""
    checked: bool = True
    """Whether the numbers were compared with their source; where not, the table says so."""


Reader = Callable[[Task, list[Path], list[str]], Iterator[Example]]
"""Gives the labelled sequences of a task's files, each with its split, in an order that depends on the files alone.
What is odd in them is added to the list of notes, a line each, by the time the last sequence is given."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite as its authors run it, as far as this project can."""

    name: str
    protocol: str
    """In words, for the table: splits, how often, what is chosen by what."""
    differs: str
    """What is done otherwise than by the authors, for the table."""
    where: str
    """Where the authors publish the files."""
    tasks: tuple[Task, ...]
    keys: Keys
    """Of every task."""
    grid: Mapping[str, tuple[object, ...]]
    """Values that are all tried; those whose weights do best on the validation splits are kept."""
    warmup: float = 0.01
    """Share of the steps in which the learning rate rises."""
    files: Callable[[Task, Path], list[Path]]
    """The files or directories of a task under the directory that a person gives. Raises MissingFiles."""
    read: Reader
    published: tuple[Published, ...] = ()

    def of_length(self, bases: int) -> "Suite":
        """This suite with windows of so many bases.

        Raises:
            DataError: its tasks have lengths of their own.
        """
        if not any(task.window for task in self.tasks):
            raise DataError(f"--length {bases}: the sequences of {self.name} have a length of their own: leave it out")
        return replace(self, tasks=tuple(task.of_length(bases) if task.window else task for task in self.tasks))

    def task(self, name: str) -> Task:
        """The task of this name.

        Raises:
            DataError: there is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise DataError(f"--tasks {name}: {self.name} has no such task: use {', '.join(t.name for t in self.tasks)}")


def first_of(candidates: list[Path], what: str, where: str) -> Path:
    """The first of these that is there.

    Raises:
        MissingFiles: none is.
    """
    for path in candidates:
        if path.exists():
            return path
    raise MissingFiles(f"{candidates[0]}: {what} is not there", where)
