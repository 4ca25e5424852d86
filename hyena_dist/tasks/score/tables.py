"""Small tables of results, as TSV, parquet and Markdown, and the bar that shows how far a reader is."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.config.digests import file_sha256
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.plain import finite
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.data.manifest import Manifest
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.files import write_durably, write_whole
from hyena_dist.tasks.columns import check_ending, marked, text_of
from hyena_dist.tasks.parts import ANOTHER, Parts


def outputs(out: Path) -> dict[str, Path]:
    """A table, its text and its picture, by what they are called in messages."""
    return {"--out": out, "the text of --out": out.with_suffix(".md"), "the picture of --out": out.with_suffix(".png")}


def parts_of(out: Path) -> Parts:
    """The parts of a table that can be written.

    Raises:
        ConfigError: it cannot be.
    """
    check_ending("--out", out)
    parts = Parts(out)
    parts.check_outputs(outputs(out))
    return parts


def facts_of(trained: Trained) -> dict[str, Any]:
    """What every header begins with: the model, and how it computes."""
    return {"version": own_version(), "torch": library_version("torch"), "model": str(trained.path),
            "weights_sha256": trained.digest(), "precision": trained.precision,
            "device": next(trained.model.parameters()).device.type, "context": trained.model.context.size}


def facts_of_shards(shards: Path) -> dict[str, Any]:
    """Which bases were read.

    Raises:
        DataError: they cannot be read.
    """
    return {"shards": str(shards), "shards_sha256": Manifest.load(shards).identity}


def digest_of(path: Path, option: str) -> str:
    """sha256 of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file_sha256(file)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror or error}): give another") from error


def write_table(out: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows of the same columns with a header; what is None, NaN or infinite is empty.

    Raises:
        OSError: it cannot be written.
    """
    names, header, rows = list(rows[0]), marked(facts), [finite(dict(row)) for row in rows]
    if out.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({name: [row[name] for row in rows] for name in names}).replace_schema_metadata(header)
        write_whole(out, lambda aside: parquet.write_table(table, aside), ANOTHER)
        return
    lines = [*(f"##{key}={value}" for key, value in header.items()), "\t".join(names),
             *("\t".join(" ".join(text_of(row[name]).split()) for name in names) for row in rows)]
    write_whole(out, lambda aside: write_durably(aside, "\n".join(lines) + "\n"), ANOTHER)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row has the names."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def bar(what: str, groups: Groups) -> Progress:
    """A bar on the terminal of the first rank."""
    return Progress(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                    console=Console(file=sys.stderr), disable=groups.world.rank > 0 or not sys.stderr.isatty())
