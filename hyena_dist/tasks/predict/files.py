"""Files of answers: a table with a row for each sequence, or an array for each where its places have answers."""

import io
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.asked import Asked
from hyena_dist.data.labelled import Labelled
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.columns import Columns, check_ending, write_columns
from hyena_dist.tasks.parts import ANOTHER
from hyena_dist.tasks.score.output import column_names
from hyena_dist.train.predictions import in_words, number_text, probabilities

ARRAYS = ".npz"
"""Ending of a file of arrays."""
_ROWS = 4096
"""Written at a time."""


def outputs(out: Path) -> dict[str, Path]:
    """What is written, by what it is called in messages. Beside arrays lies an index of them."""
    return {"--out": out} | ({"the index of --out": index_of(out)} if out.suffix == ARRAYS else {})


def index_of(out: Path) -> Path:
    """The table beside a file of arrays."""
    return out.with_name(f"{out.name}.tsv")


def check_arrays(out: Path, asked: Asked, source: Path) -> None:
    """Refuse arrays that cannot be written: they are found by the names of their sequences.

    Args:
        source: where the sequences came from, for messages.

    Raises:
        ConfigError: `out` is no name of a file of arrays, or two sequences have one name.
    """
    check_ending("--out", out, [ARRAYS])
    names = Counter(example.name for example in asked.examples)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{source}: {count:,} sequences are called {name[:80]!r}, and answers are found by "
                          "the names of their sequences: give each one of its own")


def write_rows(out: Path, asked: Asked, labelled: Labelled, answers: Iterator[np.ndarray],
               facts: Mapping[str, Any]) -> Counter[str]:
    """Write a table of answers.

    Args:
        answers: float64 [outputs] of each sequence, logits or numbers.
        facts: of the header.

    Returns:
        Of classes how often each was said.
    """
    said: Counter[str] = Counter()
    groups = _columns(asked, labelled, answers, said, in_text=out.suffix == ".tsv")
    write_whole(out, lambda aside: write_columns(aside, out.suffix, facts, groups), ANOTHER)
    return said


def _columns(asked: Asked, labelled: Labelled, answers: Iterator[np.ndarray], said: Counter[str], *,
             in_text: bool) -> Iterator[Columns]:
    """Groups of rows of the table; what is said of each sequence is counted."""
    first, heads = 0, column_names(labelled.classes or ["value"], ("name", "answer"), "class_")
    while some := list(islice(answers, _ROWS)):
        words, numbers = in_words(labelled.task, labelled.classes, np.stack(some))
        rows = slice(first, first + len(some))
        texts = _texts(asked, rows, ["answer", *heads]) | {"answer": words}
        if in_text:
            yield {**_in_cells(texts), **{head: list(map(number_text, column))
                                          for head, column in zip(heads, numbers.T, strict=True)}}
        else:
            yield {**texts, **dict(zip(heads, numbers.T.copy(), strict=True))}
        if labelled.classes:
            said.update(words)
        first += len(some)


def _texts(asked: Asked, rows: slice, further: list[str]) -> dict[str, list[str]]:
    """The names of sequences, and what their table says of them; the columns of a file but for the `further` ones."""
    heads = column_names(asked.others, ["name", *further])
    return {"name": [example.name for example in asked.examples[rows]],
            **{head: column[rows] for head, column in zip(heads, asked.others.values(), strict=True)}}


def _in_cells(texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Texts as a table separated by tabs can hold them."""
    def cell(text: str) -> str:
        return " ".join(text.split()) if any(mark in text for mark in "\t\n\r") else text

    return {name: list(map(cell, column)) for name, column in texts.items()}


def write_arrays(out: Path, asked: Asked, labelled: Labelled, answers: Iterator[np.ndarray],
                 facts: Mapping[str, Any]) -> Counter[str]:
    """Write the answers for places as arrays in float32, by the names of their sequences, and an index of them. Of
    classes they are probabilities; otherwise they are as they come.

    Args:
        answers: of each sequence, as `Answers.said` gives them.
        facts: of the header of the index.

    Returns:
        Nothing that could be counted.
    """
    shapes: list[str] = []

    def write(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w") as file:
            for example, answer in zip(asked.examples, answers, strict=True):
                array = probabilities("classification", answer) if labelled.classes else answer
                shapes.append(" ".join(map(str, array.shape)))
                content = io.BytesIO()
                np.lib.format.write_array(content, array.astype(np.float32), allow_pickle=False)
                file.writestr(f"{example.name}.npy", content.getbuffer())

    write_whole(out, write, ANOTHER)
    texts = _in_cells(_texts(asked, slice(None), ["bases", "shape"]))
    index = {**texts, "bases": [str(example.length) for example in asked.examples], "shape": shapes}
    write_whole(index_of(out), lambda aside: write_columns(aside, ".tsv", facts, [index]), ANOTHER)
    return Counter()
