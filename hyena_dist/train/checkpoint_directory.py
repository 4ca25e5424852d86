"""The directory of a run's checkpoints: which are whole, which is the newest or the best, and which are deleted."""

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyena_dist.train.checkpoint_reader import REMEDY, CheckpointError
from hyena_dist.train.files import write_whole

FORMAT = 1
MARKER = "COMPLETE"
METADATA = "metadata.json"
_NAME = re.compile(r"step-(\d{8,})")
_TYPES = {"step": int, "identity": dict}
"""Of the metadata that a load and a resume rely on, where they are there."""
_RESUMED = ("step", "identity", "data", "val_loss", "best_val_loss", "loss_scale", "seconds")
"""What a resume takes from the metadata."""

logger = logging.getLogger(__name__)


def step_directory(checkpoints_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return Path(checkpoints_dir, f"step-{step:08d}")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        CheckpointError: not a whole checkpoint.
    """
    path = Path(path)
    metadata = _inspect(path)
    if isinstance(metadata, str):
        raise CheckpointError(f"{path}: {metadata}: choose another checkpoint")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {metadata.get('format')!r}, this version reads {FORMAT}: "
                              f"use the version of hyena_dist that wrote it")
    return metadata


def read_resumable(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint that a run can go on from.

    Raises:
        CheckpointError: not a whole checkpoint, or one whose metadata lacks what a resume takes from it.
    """
    metadata = read_metadata(path)
    if missing := [key for key in _RESUMED if key not in metadata]:
        raise CheckpointError(f"{path}: its {METADATA} lacks {', '.join(missing)}, so no run can go on from it: "
                              f"{REMEDY}")
    return metadata


def is_whole(path: str | Path) -> bool:
    """Whether this is a checkpoint of which nothing is missing."""
    return not isinstance(_inspect(Path(path)), str)


def find_latest(checkpoints_dir: str | Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: the directory is there and cannot be read. A run must not start afresh because of that.
    """
    for path in _newest_first(checkpoints_dir):
        metadata = _inspect(path)
        if not isinstance(metadata, str):
            return path
        logger.warning("%s is passed over: %s", path, metadata)
    return None


def find_best(checkpoints_dir: str | Path) -> Path | None:
    """The whole checkpoint whose metadata has the lowest `val_loss`, the newest of equals; None if none has any.

    Raises:
        CheckpointError: as `find_latest`.
    """
    losses = {path: loss for path in _newest_first(checkpoints_dir) if (loss := _val_loss(path)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


def choose_checkpoint(run_dir: str | Path, choice: str) -> Path:
    """`latest` or `best` of a run, or else the path of a checkpoint; not yet read.

    Raises:
        CheckpointError: the run has no such checkpoint.
    """
    finders = {"latest": find_latest, "best": find_best}
    if choice not in finders:
        return Path(choice)
    found = finders[choice](Path(run_dir, "checkpoints"))
    if found is None:
        remedy = "let the run save one first" if choice == "latest" else "choose latest, or a checkpoint's path"
        raise CheckpointError(f"{run_dir} has no whole checkpoint{' with a validation loss' * (choice == 'best')}: "
                              f"{remedy}")
    return found


def amend_metadata(path: str | Path, **values: Any) -> None:
    """Change values beside the tensors of a whole checkpoint; for one rank, while none saves.

    Raises:
        CheckpointError: not a whole checkpoint.
        OSError: it could not be written; the checkpoint is as before.
    """
    text = json.dumps({**read_metadata(path), **values}, indent=1)
    write_whole(Path(path) / METADATA, lambda aside: aside.write_text(text))


def prune(checkpoints_dir: str | Path, *, keep: int = 2) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best, and what killed runs left.

    For one rank, while none saves. What cannot be deleted is logged.
    """
    whole = [path for path in _newest_first(checkpoints_dir) if is_whole(path)]
    best = find_best(checkpoints_dir)
    for path in whole[keep:]:
        if path != best:
            # Under a name of the leftovers first: cut short, a delete must not leave what looks like a torn checkpoint.
            try:
                path.rename(path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}"))
            except OSError as error:
                logger.warning("%s could not be deleted: %s", path, error)
    for path in Path(checkpoints_dir).glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _newest_first(checkpoints_dir: str | Path) -> list[Path]:
    try:
        names = os.listdir(checkpoints_dir)  # pathlib's glob takes a directory that it may not read for an empty one
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{checkpoints_dir}: cannot be searched for checkpoints ({error.strerror}): make it a "
                              "readable directory, or change train.run_dir") from error
    found = [(int(match[1]), name) for name in names if (match := _NAME.fullmatch(name))]
    return [Path(checkpoints_dir, name) for _, name in sorted(found, reverse=True)]


def _inspect(path: Path) -> dict[str, Any] | str:
    """The metadata of a whole checkpoint, or why it is none.

    Raises:
        CheckpointError: it may not be read, so that nobody knows.
    """
    try:
        marker, metadata = (_read_object(path / name) for name in (MARKER, METADATA))
        for name, size in marker.items():
            file = path / name
            if Path(name).name != name or not file.is_file() or file.stat().st_size != size:
                return f"its file {name} is missing or has another size than when it was written"
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return f"it has no {missing}, so its writing was cut short" if path.is_dir() else "no such checkpoint"
    except PermissionError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}: let this user read it") from error
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MARKER} or {METADATA} cannot be read ({error})"
    return (_wrong_type(metadata) if metadata.get("format") == FORMAT else None) or metadata


def _wrong_type(metadata: Mapping[str, Any]) -> str | None:
    present = {"optimizer_step_count": int, **{key: kind for key, kind in _TYPES.items() if key in metadata}}
    for key, kind in present.items():
        if type(metadata.get(key)) is not kind:
            return f"its {METADATA} has {metadata.get(key)!r:.40} for {key}, which is no {kind.__name__}"
    return None


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value


def _val_loss(path: Path) -> float | None:
    metadata = _inspect(path)
    loss = None if isinstance(metadata, str) else metadata.get("val_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else None
