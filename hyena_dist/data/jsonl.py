"""JSON lines, an object each with its sequence under "text" or "sequence", and its name under "record", "id" or "name".

OpenGenome2 has this form. A line without a name is called after its file and its number, as `genes.17`; of a name the
first word counts, as in FASTA. What is no IUPAC code, such as tags of a species in the text, is refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hyena_dist.data.blocks import OnBytes, lines_of
from hyena_dist.data.contigs import Contig, Source, full_name, sequence
from hyena_dist.data.errors import DataError

TEXT_KEYS = ("text", "sequence")
NAME_KEYS = ("record", "id", "name")


def named(source: Source, row: Mapping[str, Any], number: int, where: str) -> Contig:
    """The contig of a row of a table.

    Args:
        number: of the row, from 1 on.
        where: file and place, for messages.

    Raises:
        DataError: it has no sequence, or one that is not of IUPAC codes, or no name where it has a column for it.
    """
    text = next((row[key] for key in TEXT_KEYS if key in row), None)
    if not isinstance(text, str):
        raise DataError(f"{where}: has no text under {' or '.join(map(repr, TEXT_KEYS))}; name the sequence so")
    key = next((key for key in NAME_KEYS if row.get(key) is not None), None)
    if key is None:
        stem = source.path.name.split(".")[0]
        name = f"{''.join(letter if letter.isprintable() and letter != ' ' else '_' for letter in stem)}.{number}"
    elif isinstance(row[key], str | int) and str(row[key]).split():
        name = str(row[key]).split()[0]
    else:
        raise DataError(f"{where}: {key!r} is no name; write letters or digits")
    where = f"{where}: {name[:80]!r}"
    return Contig(full_name(source, _encoded(name, where), where), source, sequence(_encoded(text, where), where))


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates
        raise DataError(f"{where}: {text[error.start]!a} is no character; remove it") from None


def contigs(source: Source, on_bytes: OnBytes) -> Iterator[Contig]:
    """The lines of a JSON file that hold an object; see `contigs.Reader`."""
    for number, line in enumerate(lines_of(source.path, on_bytes), 1):
        if not line.strip():
            continue
        where = f"{source.path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON ({error}); write an object on each line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: is no object; write {{\"text\": \"ACGT\"}} on each line")
        yield named(source, row, number, where)
