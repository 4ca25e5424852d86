"""COMPLETE: the files of a checkpoint with their sizes and digests, and whether they still are what was written.

Those of older versions have sizes only, as `{"name": bytes}`.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyena_dist.config.digests import file_sha256
from hyena_dist.config.plain import open_regular, read_object

MARKER = "COMPLETE"
THREADS = 4
"""That read and digest files, where there are as many files and cores: hashlib lets go of the interpreter."""


@dataclass(frozen=True)
class Listed:
    """What the marker says of a file."""

    size: int
    sha256: str | None
    """None: written by a version that had no digests."""


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of some files, each read once, several at a time.

    Raises:
        OSError: one cannot be read.
    """
    names = sorted(names, key=lambda name: -(directory / name).stat().st_size)  # the longest first
    with ThreadPoolExecutor(max(1, min(THREADS, os.cpu_count() or 1, len(names)))) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(directory / name), names), strict=True))


def entry(path: Path, sha256: str) -> dict[str, Any]:
    """What the marker is to say of a file that has this digest."""
    return {"bytes": path.stat().st_size, "sha256": sha256}


def read_marker(directory: Path) -> dict[str, Listed]:
    """The files that make a checkpoint whole, metadata.json excepted.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such list.
    """
    listed = {name: _listed(name, value) for name, value in read_object(directory / MARKER).items()}
    if len({value.sha256 is None for value in listed.values()}) != 1:
        raise ValueError(f"its {MARKER} is no list of files with their sizes and digests")
    return listed


def missing_file(directory: Path, listed: Mapping[str, Listed]) -> str | None:
    """The first file that is not there in its size.

    Raises:
        PermissionError: nobody may look.
    """
    for name, value in listed.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != value.size:
            return name
    return None


def changed_file(directory: Path, listed: Mapping[str, Listed]) -> str | None:
    """The first file whose content is not what was written; all are read.

    Raises:
        OSError: one cannot be read.
    """
    wanted = {name: value.sha256 for name, value in listed.items() if value.sha256 is not None}
    found = digests(directory, wanted)
    return next((name for name, digest in wanted.items() if found[name] != digest), None)


def _listed(name: str, value: Any) -> Listed:
    plain = Path(name).name == name
    if plain and type(value) is int:
        return Listed(value, None)
    if plain and isinstance(value, dict) and value.keys() == {"bytes", "sha256"}:
        size, sha256 = value["bytes"], value["sha256"]
        if type(size) is int and isinstance(sha256, str):
            return Listed(size, sha256)
    raise ValueError(f"its {MARKER} has {value!r:.60} for {name!r:.60}, which is no file's size and digest")


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return file_sha256(file)
