"""Labels that belong to places of a sequence: a class for each base, numbers for each bin, a number for each pair of
bins. They stand in the table, in an .npy file of each row, or in one .npy file beside the table that has a row for each
of its rows, which is mapped and not read before it is asked for.

What is not known is a dot or -1 among classes, and NaN among numbers; it is never scored.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hyena_dist.config.errors import one_line
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.tokenizer import IGNORE

UNKNOWN = "."
"""The letter of a base whose class is not known."""


@dataclass(frozen=True)
class Values:
    """The labels of a sequence as an array, held or in a file."""

    source: np.ndarray | Path
    """An array, which may be mapped, or an .npy file."""
    where: str
    """For messages."""

    def array(self) -> np.ndarray:
        """Mapped where it is in a file.

        Raises:
            DataError: the file cannot be read, or holds no numbers.
        """
        return open_array(self.source, self.where) if isinstance(self.source, Path) else self.source

    def digest(self) -> bytes:
        """Of the shape and of every value; a mapped file is read for it, and not kept."""
        array = self.array()
        found = blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=16)
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return found.digest()


def open_array(path: Path, where: str = "") -> np.ndarray:
    """An .npy file of numbers, mapped.

    Raises:
        DataError: there is none, it is damaged, or it holds something else.
    """
    prefix = f"{where}: " if where else ""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, BadZipFile) as error:
        raise DataError(f"{prefix}{path}: cannot be read as an array ({one_line(error)}); save it by numpy.save as "
                        "numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise DataError(f"{prefix}{path}: does not hold one array of numbers; save it by numpy.save as numbers")
    return array


def beside(table: Path) -> Path:
    """The .npy file that has the labels of a table's rows: peaks.npy for peaks.bed.gz."""
    name = table.name.removesuffix(".gz")
    return table.with_name(name.rpartition(".")[0] + ".npy")


def written(text: str, table: Path, where: str, *, per_base: bool = False) -> Values | None:
    """The labels that a cell of a table names or lists; None: it is a text of classes.

    Args:
        per_base: whether they are classes of bases: then what has no blank, comma or semicolon in it is such a text, of
            digits too, and whole numbers are read as such.

    Raises:
        DataError: it names a file that cannot be used.
    """
    if text.endswith(".npy"):
        values = Values(table.parent / text, where)
        values.array()
        return values
    words = text.replace(",", " ").replace(";", " ").split()
    if per_base and words == [text]:
        return None
    if per_base and all(re.fullmatch("[+-]?[0-9]{1,18}", word) for word in words):
        return Values(np.array([int(word) for word in words], dtype=np.int64), where)
    try:
        return Values(np.array([float(word) for word in words]), where)
    except ValueError:
        return None


@dataclass(frozen=True)
class Places:
    """Which places have labels, and what a label is.

    The arrays that `read` gives: of per_base int64 [L], IGNORE where there is no label; of binned float32
    [N, tracks], and of pairs float32 [N, N] at i < j, of all N bins of a sequence, NaN where there is no label.
    """

    section: FinetuneSection
    classes: tuple[str, ...] = ()
    """Of per_base, sorted."""
    tracks: int = 1

    @property
    def bin_size(self) -> int:
        return 1 if self.section.task == "per_base" else self.section.bin_size

    def check(self, bases: int, label: str, values: Values | None, where: str) -> None:
        """That a sequence of so many bases has the labels of its places; their shape, not yet their values.

        Raises:
            DataError: it has not.
        """
        where = where if values is None else values.where
        wanted = self.shapes(bases, where)
        if values is None:
            if self.section.task != "per_base":
                raise DataError(f"{where}: the label {label[:40]!r} is no list of numbers: write numbers with blanks "
                                "between, or the name of an .npy file")
            if len(label) != bases:
                raise DataError(f"{where}: has {len(label):,} letters of labels and {bases:,} bases: write a letter "
                                f"for each base, {UNKNOWN!r} where its class is not known")
            return
        array = values.array()
        if array.shape not in wanted:
            raise DataError(f"{where}: the labels are an array of {list(array.shape)}, and a sequence of {bases:,} "
                            f"bases has labels of {' or '.join(str(list(shape)) for shape in wanted)} "
                            "(finetune.task, bin_size, bins_cut and diagonals): correct one of them")
        if self.section.task == "per_base" and array.dtype.kind == "f":
            raise DataError(f"{where}: the labels of finetune.task=per_base are numbers of classes, and the array is "
                            f"of {array.dtype}: save whole numbers, -1 where none is known, or set "
                            "finetune.task=binned and bin_size=1")

    def shapes(self, bases: int, where: str) -> list[tuple[int, ...]]:
        """That the labels of a sequence of so many bases may have.

        Raises:
            DataError: it is not whole bins, or too few.
        """
        if self.section.task == "per_base":
            return [(bases,)]
        bins, rest = divmod(bases, self.bin_size)
        known = bins - 2 * self.section.bins_cut
        if rest or known < 1:
            raise DataError(f"{where}: {bases:,} bases are not whole bins of {self.bin_size:,}, at least one more than "
                            f"the {self.section.bins_cut:,} cut off at either end: correct the sequence, or "
                            "finetune.bin_size and finetune.bins_cut")
        if self.section.task == "binned":
            return [(known,), (known, self.tracks)] if self.tracks == 1 else [(known, self.tracks)]
        side = known - self.section.diagonals
        if side < 1:
            raise DataError(f"{where}: {known:,} bins have no pair that is {self.section.diagonals:,} apart: lower "
                            "finetune.diagonals or finetune.bin_size")
        return [(known, known), (side * (side + 1) // 2,)]

    def read(self, bases: int, label: str, values: Values | None, where: str) -> np.ndarray:
        """The labels of a sequence that `check` took.

        Raises:
            DataError: a value is infinite, no class, or less than 0 where counts are wanted.
        """
        if self.section.task == "per_base":
            return self._classes_of(label, values)
        assert values is not None
        where = values.where
        with np.errstate(over="ignore"):  # what is too large is refused as what is infinite
            array = np.array(values.array(), dtype=np.float32)
        bad = np.isinf(array) | (array < 0) if self.section.loss == "poisson" else np.isinf(array)
        if bad.any():
            place = [int(axis[0]) for axis in bad.nonzero()]
            raise DataError(f"{where}: the label at {place} is {array[tuple(place)]}: write numbers"
                            f"{' of 0 or more (finetune.loss=poisson)' * (self.section.loss == 'poisson')}, or NaN "
                            "where none is known")
        bins, cut = bases // self.bin_size, self.section.bins_cut
        inside = slice(cut, bins - cut)
        if self.section.task == "binned":
            found = np.full((bins, self.tracks), np.nan, dtype=np.float32)
            found[inside] = array.reshape(-1, self.tracks)
            return found
        known = bins - 2 * cut
        pairs = np.triu_indices(known, self.section.diagonals)
        found = np.full((bins, bins), np.nan, dtype=np.float32)
        found[pairs[0] + cut, pairs[1] + cut] = array if array.ndim == 1 else array[pairs]
        return found

    def _classes_of(self, label: str, values: Values | None) -> np.ndarray:
        if values is None:
            table = np.full(256, IGNORE, dtype=np.int64)
            for number, name in enumerate(self.classes):
                if len(name) == 1:
                    table[ord(name)] = number
            return table[np.frombuffer(label.encode("latin-1"), dtype=np.uint8)]
        array = _numbers_of_classes(values)
        # Names that are numbers come first among the classes, in order. What is not known is found before them all.
        known = np.array([-1, *(int(name) for name in self.classes if name.isdigit())])
        found = np.searchsorted(known, array).clip(max=len(known) - 1)
        if (outside := known[found] != array).any():
            place = int(outside.argmax())
            raise DataError(f"{values.where}: the class {array[place]} of base {place + 1:,} is of no training "
                            "sequence's base, and not -1")
        return np.where(array == -1, IGNORE, found - 1)


def _numbers_of_classes(values: Values) -> np.ndarray:
    """int64 [L], the classes of bases, -1 where none is known.

    Raises:
        DataError: another number is less than 0, or is what -1 becomes in an array without a sign.
    """
    array = values.array()
    if array.size and array.dtype.kind in "iu":
        least, most = int(array.argmin()), int(array.argmax())
        minus = array.dtype.kind == "u" and bool(array[most] == np.iinfo(array.dtype).max)
        if minus or array[least] < -1 or array[most] > np.iinfo(np.int64).max:
            place = least if array[least] < -1 else most
            raise DataError(f"{values.where}: base {place + 1:,} has the number {array[place]}, which is no class"
                            f"{f' but what -1 becomes in an array of {array.dtype}' * minus}: write classes as numbers "
                            "from 0 on, and -1 where none is known, in an array with a sign as int16")
    return array.astype(np.int64)


def places_of(section: FinetuneSection, first: tuple[int, ...] | None) -> Places:
    """What a table's labels are, without the names of classes, from the shape of its first row's array."""
    tracks = first[1] if section.task == "binned" and first is not None and len(first) == 2 else 1
    return Places(section, tracks=tracks)


def classes_in(rows: Iterable[tuple[str, Values | None, str]]) -> tuple[Counter[str], int]:
    """How often each class is among the labels (text, values, where) of bases, and how many bases have none.

    Raises:
        DataError: a letter is of no class, as a blank, or a number is none.
    """
    found: Counter[str] = Counter()
    for label, values, where in rows:
        if values is None:
            odd = [letter for letter in sorted(set(label)) if not letter.isascii() or not letter.isprintable()
                   or letter == " "]
            if odd:
                raise DataError(f"{where}: {odd[0]!a} among the labels of its bases is no class: write one ASCII "
                                f"letter for each base, {UNKNOWN!r} where its class is not known")
            found.update(label)
        else:
            numbers, counts = np.unique(_numbers_of_classes(values), return_counts=True)
            found.update({UNKNOWN if number == -1 else str(number): int(count)
                          for number, count in zip(numbers.tolist(), counts, strict=True)})
    return found, found.pop(UNKNOWN, 0)
