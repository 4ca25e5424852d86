"""Small tables of results, as TSV, parquet and Markdown, and the bar that shows how far a reader is."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.files import write_durably, write_whole

MARK = "hyena_dist."
"""Before every key of a header."""
ENDINGS = (".tsv", ".parquet")


def check_out(out: Path) -> None:
    """Raises ConfigError: a table cannot be written there."""
    if out.suffix not in ENDINGS:
        raise ConfigError(f"--out {out}: name a file that ends in {' or '.join(ENDINGS)}")
    check_new(out)
    if out.suffix == ".parquet":
        need_pyarrow(out)


def check_new(out: Path) -> None:
    """Raises ConfigError: it is there, or its directory is not."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists: choose another, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}: make it, or choose another")


def need_pyarrow(out: Path) -> None:
    """Raises ConfigError: parquet cannot be written."""
    try:
        import pyarrow  # noqa: F401 - whether it is there
    except ImportError:
        raise ConfigError(f"--out {out}: parquet is written with pyarrow; install it with pip install "
                          "'hyena-dist[tables]', or name a .tsv") from None


def facts_of(trained: Trained) -> dict[str, Any]:
    """What every header begins with: the model, and how it computes."""
    return {"version": own_version(), "torch": library_version("torch"), "model": str(trained.path),
            "weights_sha256": trained.digest(), "precision": trained.precision,
            "device": next(trained.model.parameters()).device.type, "context": trained.model.context.size}


def marked(facts: Mapping[str, Any]) -> dict[str, str]:
    """A header's keys and values as they stand in a file."""
    return {f"{MARK}{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def write_table(out: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows of the same columns with a header; what is None is empty.

    Raises:
        OSError: it cannot be written.
    """
    names, header = list(rows[0]), marked(facts)
    if out.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({name: [row[name] for row in rows] for name in names}).replace_schema_metadata(header)
        write_whole(out, lambda aside: parquet.write_table(table, aside))
        return
    lines = [*(f"##{key}={value}" for key, value in header.items()), "\t".join(names),
             *("\t".join(_text(row[name]) for name in names) for row in rows)]
    write_whole(out, lambda aside: write_durably(aside, "\n".join(lines) + "\n"))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else " ".join(str(value).split())


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row has the names."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def bar(what: str, groups: Groups) -> Progress:
    """A bar on the terminal of the first rank."""
    return Progress(TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                    console=Console(file=sys.stderr), disable=groups.world.rank > 0 or not sys.stderr.isatty())
