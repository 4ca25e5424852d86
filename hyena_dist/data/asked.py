"""Sequences that a fine-tuned model is asked about. They stand in the same kinds of files as labelled ones, and need no
labels."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hyena_dist.config.sections.finetune import PLACES, FinetuneSection
from hyena_dist.data.blocks import start_of
from hyena_dist.data.contigs import Source, as_dna, sequence
from hyena_dist.data.errors import DataError
from hyena_dist.data.places import Places
from hyena_dist.data.readable import crop, foreign
from hyena_dist.data.sources import contigs_of
from hyena_dist.data.tables import Columns, Example, read_table, rows_of
from hyena_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """All the sequences of a file, in order."""

    examples: list[Example]
    """Without labels."""
    others: dict[str, list[str]] = field(default_factory=dict)
    """The other columns of a table, by their names: the text of each row."""
    notes: list[str] = field(default_factory=list)
    """What is odd in them, a line each."""


def read_asked(path: Path, section: FinetuneSection, tokenizer: Tokenizer, *, most: int,
               genome: Path | None = None) -> Asked:
    """The sequences of a file as a run of these settings reads them: FASTA, a table whose column of sequences is called
    as in the run's own table, or intervals.

    Args:
        most: bases that the model takes.
        genome: what intervals are cut out of; given, the file is one of intervals.

    Raises:
        DataError: the file cannot be read, or a sequence is longer than the model takes, shorter than a token or, where
            bins are answered for, not of whole bins.
    """
    found = _read(path, section.sequence_column, genome)
    if not found.examples:
        raise DataError(f"{path}: holds no sequences: give a file with at least one")
    splits = {"asked": found.examples}
    notes = crop(splits, section.longer, most, otherwise="shorten it, or give a run that was fine-tuned with "
                 "finetune.longer=left, center or right, which keeps that part")
    for example in splits["asked"]:
        if not tokenizer.tokens(example.length):
            raise DataError(f"{example.where}: has {example.length:,} bases, less than the {tokenizer.k} of a token: "
                            "remove it")
        if section.task in PLACES:
            Places(section).shapes(example.length, example.where)
    return Asked(splits["asked"], found.others, notes + foreign(splits))


def _read(path: Path, column: str, genome: Path | None) -> Asked:
    if genome is not None:
        return Asked(read_table(path, Columns(label=""), genome))
    start, _ = start_of(path, empty_is="the file is empty: give a file of sequences")
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b">"):
        return _of_table(path, column)
    return Asked([Example(contig.name, as_dna(contig.bases).tobytes(), "", f"{path}: {contig.name}")
                  for contig in contigs_of(Source(path))])


def _of_table(path: Path, column: str) -> Asked:
    def check(header: list[str]) -> None:
        said = f"the header {', '.join(header)[:200]!r}"
        if column not in header:
            raise DataError(f"{path}: line 1: {said} has no column {column!r}, which holds the sequences in the run's "
                            "table: call that of the sequences so, or give intervals with --fasta")
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            raise DataError(f"{path}: line 1: {said} has the column {twice[0]!r} twice: rename or remove one")

    examples: list[Example] = []
    others: dict[str, list[str]] = {}
    for number, (where, values) in enumerate(rows_of(path, check)):
        bases = as_dna(sequence(values.pop(column).strip().encode(), where)).tobytes()
        name = values.get("name") or values.get("id") or str(number)
        examples.append(Example(name, bases, "", where))
        for other, text in values.items():
            others.setdefault(other, []).append(text)
    return Asked(examples, {name: texts for name, texts in others.items() if name != "name"})
