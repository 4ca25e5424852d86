"""Checkpoints for tests: which is the newest, and edits as careful as those of whoever writes one."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hyena_dist.checkpoint.directory import find_latest


def latest(checkpoints_dir: str | Path) -> Path | None:
    """The path of the newest sound checkpoint."""
    found = find_latest(checkpoints_dir)
    return None if found is None else found.path


def write_metadata(checkpoint: Path, value: Any) -> None:
    """Put in a metadata.json of any content, with the digest that belongs to it."""
    if isinstance(value, dict):
        content = {key: item for key, item in value.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        value = {"sha256": digest, **content}
    (checkpoint / "metadata.json").write_text(json.dumps(value))


def edit_metadata(checkpoint: Path, **changes: Any) -> None:
    """Change fields of metadata.json, with the digest that belongs to it."""
    write_metadata(checkpoint, json.loads((checkpoint / "metadata.json").read_text()) | changes)


def put_in(checkpoint: Path, name: str, content: bytes) -> None:
    """Put in a file as a careful attacker would, with the marker to match."""
    (checkpoint / name).write_bytes(content)
    listed = json.loads((checkpoint / "COMPLETE").read_text())
    listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "COMPLETE").write_text(json.dumps(listed))


def without_digests(checkpoint: Path) -> None:
    """Make it one of the versions that had none."""
    listed = json.loads((checkpoint / "COMPLETE").read_text())
    (checkpoint / "COMPLETE").write_text(json.dumps({name: value["bytes"] for name, value in listed.items()}))
    metadata = json.loads((checkpoint / "metadata.json").read_text())
    del metadata["sha256"]
    (checkpoint / "metadata.json").write_text(json.dumps(metadata))


def flip(path: Path, offset: int, mask: int = 1, length: int = 1) -> None:
    """Damage some bytes in a row, as a disk does: the size stays."""
    with path.open("r+b") as file:
        file.seek(offset)
        damaged = bytes(byte ^ mask for byte in file.read(length))
        file.seek(offset)
        file.write(damaged)
