"""The directory of a run's checkpoints: which are whole and sound, the newest or the best, and which are deleted.

Whole: nothing is missing of it, by names and sizes. Sound: its files are what was written, by their digests. One that
is not is passed over, loudly, for the one before it, so that nobody has to come and say so.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from hyena_dist.checkpoint.files import MARKER, Listed, changed_file, missing_file, read_marker
from hyena_dist.checkpoint.metadata import FORMAT, METADATA, PLACE, PRETRAINING, RESUMED, read_sealed, seal
from hyena_dist.checkpoint.reader import INDEX, CheckpointError, DamagedError, TensorReader, unread
from hyena_dist.config.identity import measured_alike
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, broadcast
from hyena_dist.runtime.files import write_whole

_NAME = re.compile(r"step-(\d{8,})")
_NAMED = 8
"""Checkpoints that a message lists."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was sound when it was opened."""

    path: Path
    metadata: dict[str, Any]

    @property
    def has_no_run(self) -> bool:
        """Whether it holds weights that no run of this program trained, with no place in any data."""
        return self.metadata.get("data", {}) is None

    @property
    def objective(self) -> str:
        """The name of what its run learnt."""
        return str(self.metadata.get("objective", PRETRAINING))

    def check_resumable(self) -> None:
        """Raises CheckpointError: its metadata lacks what a resume takes from it."""
        if self.has_no_run:
            raise CheckpointError(f"{self.path}: it has weights alone, and no run that could go on: start one from "
                                  "them with train.resume=weights:PATH in a new train.run_dir")
        data = self.metadata.get("data")
        missing = [key for key in RESUMED if key not in self.metadata]
        place = data if self.objective == PRETRAINING else None
        if missing := missing + [f"data.{key}" for key in PLACE if place is not None and key not in place]:
            raise CheckpointError(f"{self.path}: its {METADATA} lacks {', '.join(missing)}, so no run can go on from "
                                  "it: choose another checkpoint")


def step_directory(checkpoints_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return Path(checkpoints_dir, f"step-{step:08d}")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None: another name, which says nothing."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What was saved beside the tensors, of which nothing is read.

    Raises:
        CheckpointError: not a whole checkpoint, or none.
    """
    return _inspect(Path(path))[0]


def is_whole(path: str | Path) -> bool:
    """Whether this is a checkpoint of which nothing is missing.

    Raises:
        CheckpointError: nobody may look, or another version wrote it.
    """
    try:
        _inspect(Path(path))
    except DamagedError:
        return False
    return True


def open_checkpoint(path: str | Path, groups: Groups | None = None) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run there. Where it is damaged, the newest sound one before it
    beside it. Every rank reads all of it, as a load does, and all take the same; collective.

    Raises:
        CheckpointError: on every rank. There is none, it may not be read, or another version wrote it; DamagedError:
            it is damaged, and so is all before it.
    """
    groups = groups or Groups.single()
    candidates = broadcast(agree(partial(_meant, Path(path)), groups), groups)
    found, damage = _first_sound(candidates, groups)
    if found is None:
        raise damage[0]
    return found


def find_latest(checkpoints_dir: str | Path, groups: Groups | None = None, *,
                passed_over: set[Path] | None = None) -> Checkpoint | None:
    """The newest sound checkpoint; damaged ones are passed over with a warning. Collective.

    Args:
        passed_over: damaged checkpoints are added to it.

    Raises:
        CheckpointError: on every rank. The directory or a checkpoint is there and cannot be read: a run must not start
            afresh because of that.
    """
    groups = groups or Groups.single()
    # The first rank's view: the others may look later.
    candidates = broadcast(agree(lambda: _newest_first(checkpoints_dir) if groups.world.rank == 0 else [], groups),
                           groups)
    found, damage = _first_sound(candidates, groups)
    if passed_over is not None:
        passed_over.update(error.path for error in damage)
    return found


def find_best(checkpoints_dir: str | Path) -> Checkpoint | None:
    """The sound checkpoint whose metadata has the lowest `val_loss`, the newest of equals; None if none has any.

    Only losses that were measured as the newest checkpoint's would be are compared (`identity.MEASURE`).

    Raises:
        CheckpointError: as `find_latest`.
    """
    return _first_sound(next(iter(_best_first(_newest_first(checkpoints_dir))), []), Groups.single())[0]


def choose_checkpoint(run_dir: str | Path, choice: str) -> Checkpoint:
    """`latest` or `best` of a run, or else what `open_checkpoint` gives for a path.

    Raises:
        CheckpointError: the run has no such checkpoint.
    """
    finders = {"latest": find_latest, "best": find_best}
    if choice not in finders:
        if not Path(choice).exists():
            beside = _choice_beside(Path(run_dir, "checkpoints", choice)).removeprefix("choose ")
            raise CheckpointError(f"{choice}: no such checkpoint: use latest, best, or {beside}")
        return open_checkpoint(choice)
    found = finders[choice](Path(run_dir, "checkpoints"))
    if found is None:
        remedy = "let the run save one first" if choice == "latest" else "choose latest, or a checkpoint's path"
        raise CheckpointError(f"{run_dir} has no whole checkpoint{' with a validation loss' * (choice == 'best')}: "
                              f"{remedy}")
    return found


def is_sound(path: str | Path) -> bool:
    """Whether a checkpoint is whole and what was written; all of it is read.

    Raises:
        CheckpointError: as `is_whole`.
    """
    try:
        _check(Path(path))
    except DamagedError:
        return False
    return True


def amend_metadata(path: str | Path, **values: Any) -> None:
    """Change values beside the tensors of a whole checkpoint; for one rank, while none saves.

    Raises:
        CheckpointError: not a whole checkpoint.
        OSError: it could not be written; the checkpoint is as before.
    """
    text = seal({**read_metadata(path), **values})
    write_whole(Path(path) / METADATA, lambda aside: aside.write_text(text, encoding="utf-8"))


def prune(checkpoints_dir: str | Path, *, keep: int = 2, keep_every: int = 0,
          passed_over: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` whole checkpoints, the best, and those that are kept for good; and what killed
    runs left.

    For one rank, while none saves. What cannot be deleted is logged.

    Args:
        keep_every: those of its multiples are kept for good, as are those that say so themselves: a run that was
            resumed with another `train.keep_every` deletes none that it had promised to keep. 0: none.
        passed_over: checkpoints known to be damaged, which do not count and are left to their owner.
    """
    whole = [path for path in _newest_first(checkpoints_dir) if path not in passed_over and is_whole(path)]
    best = {group[0] for group in _best_first(whole) if group}
    for path in whole[keep:]:
        if path not in best and not _for_good(path, keep_every):
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


def _meant(path: Path) -> list[Path]:
    """The checkpoints that a path of the user's stands for, in the order in which they are tried: the named one and
    those of earlier steps beside it, or all of a run, newest first.

    Raises:
        CheckpointError: there is none.
    """
    try:
        there, is_checkpoint = path.is_dir(), (path / MARKER).exists()
        of_run = there and not is_checkpoint and (path / "checkpoints").is_dir()
    except OSError as error:
        raise unread(path, error) from error
    if not there:
        raise CheckpointError(f"{path}: no such checkpoint: {_choice_beside(path)}")
    found = [] if is_checkpoint else _newest_first(path / "checkpoints" if of_run else path)
    if of_run and not found:
        raise CheckpointError(f"{path}: this run has no checkpoint: let it save one first, or choose another")
    if found:
        return found
    step = step_of(path)
    before = [] if step is None else [other for other in _newest_first(path.parent) if (step_of(other) or 0) < step]
    return [path, *before]


def _choice_beside(gone: Path) -> str:
    """What to choose instead of a checkpoint that is not there: those that its run still has."""
    for place in (gone.parent, gone.parent / "checkpoints"):  # where it was named without its run's `checkpoints`
        if place.is_dir() and (kept := [path.name for path in _newest_first(place)]):
            more = f" and {len(kept) - _NAMED} older ones" if len(kept) > _NAMED else ""
            return (f"choose one that is kept in {place} ({', '.join(kept[:_NAMED])}{more}); train.keep_every=N lets a "
                    "run keep every N-th step")
    return "choose another checkpoint"


def _for_good(path: Path, keep_every: int) -> bool:
    """Whether a whole checkpoint is of a step that is never deleted, by its own run's keys or those of now."""
    step, own = step_of(path) or 0, _inspect(path)[0].get("identity", {}).get("train.keep_every")
    return step > 0 and any(type(every) is int and every > 0 and step % every == 0 for every in (keep_every, own))


def _first_sound(candidates: Iterable[Path], groups: Groups) -> tuple[Checkpoint | None, list[DamagedError]]:
    """The first that is sound on every rank, and what is wrong with those before it; collective."""
    damage: list[DamagedError] = []
    for path in candidates:
        try:
            return Checkpoint(path, agree(partial(_check, path), groups)), damage
        except DamagedError as error:  # the same on every rank
            damage.append(error)
            if groups.world.rank == 0:
                logger.warning("%s is passed over: %s", path, error.reason)
    return None, damage


def _best_first(newest_first: Iterable[Path]) -> list[list[Path]]:
    """The whole checkpoints that have a validation loss, best first, in groups of those that were measured alike; the
    first group is that of the newest checkpoint, with a loss or without."""
    groups: list[tuple[dict[str, Any], dict[Path, float]]] = []
    for path in newest_first:
        try:
            metadata = _inspect(path)[0]
        except DamagedError:
            continue
        own = metadata.get("identity", {})
        losses = next((losses for other, losses in groups if measured_alike(own, other)), None)
        if losses is None:
            groups.append((own, losses := {}))
        if metadata.get("val_loss") is not None:
            losses[path] = metadata["val_loss"]
    return [sorted(losses, key=losses.__getitem__) for _, losses in groups]  # stable: the newest of equals first


def _check(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint of which all is read once.

    Raises:
        CheckpointError: as `_inspect`; DamagedError: a file of it is not what was written.
    """
    metadata, listed = _inspect(path)
    try:
        changed = changed_file(path, listed)
    except OSError as error:
        raise unread(path, error) from error
    if changed is not None:
        raise DamagedError(path, f"its file {changed} is not what was written (sha256)")
    reader = TensorReader(path)
    if unknown := (reader.files | {INDEX}) - listed.keys():
        raise DamagedError(path, f"its {MARKER} does not name {min(unknown)}")
    if any(value.sha256 is None for value in listed.values()):
        _say_without_digests(path.parent)
        for key, shape in reader.shapes.items():  # to read them is all that can be done
            reader.read({key: shape})
    return metadata


@cache
def _say_without_digests(checkpoints_dir: Path) -> None:
    logger.warning("%s: checkpoints of an older version, without digests: what has changed in them on the disk is not "
                   "noticed", checkpoints_dir)


def _inspect(path: Path) -> tuple[dict[str, Any], dict[str, Listed]]:
    """The metadata of a whole checkpoint, and its other files.

    Raises:
        CheckpointError: nobody may look, or another version wrote it; DamagedError: it is not whole, or not there.
    """
    try:
        listed = read_marker(path)
        metadata = read_sealed(path, sealed=any(value.sha256 is not None for value in listed.values()))
        missing = missing_file(path, listed)
    except FileNotFoundError as error:
        # Listed a moment ago, it may have been deleted since, or be a link to what is not there.
        raise DamagedError(path, f"it has no {Path(error.filename).name}: its writing was cut short, or it is no "
                                 "checkpoint" if os.path.isdir(path) else "it is not there") from error
    except OSError as error:
        raise unread(path, error) from error
    except ValueError as error:
        raise DamagedError(path, f"{error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {metadata.get('format')!r}, this version reads {FORMAT}: "
                              f"use the version of hyena_dist that wrote it")
    if missing is not None:
        raise DamagedError(path, f"its file {missing} is missing or has another size than when it was written")
    if step_of(path) is not None and metadata.get("step", step_of(path)) != step_of(path):
        raise DamagedError(path, f"its {METADATA} is of step {metadata['step']}")
    return metadata, listed
