"""Reads tensors from torch's distributed checkpoint files without trusting who wrote them.

torch unpickles the index file `.metadata` without restriction, and entries that are not tensors as well. Here the index
may name only the classes that describe tensors, and only tensors are read (torch loads those with weights_only).
"""

import errno
import math
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hyena_dist.config.errors import UserError, first_sentence
from hyena_dist.config.plain import open_regular
from hyena_dist.config.unpickle import Unpickler

INDEX = ".metadata"
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {"Metadata", "TensorStorageMetadata", "TensorProperties",
                                              "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
                                              "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module from Python 3.13 on
}


_NOT_NOW = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
                      errno.ETIMEDOUT, errno.EAGAIN})
"""Errors that say nothing of what is on the disk."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the path, the reason and the remedy."""


class DamagedError(CheckpointError):
    """A checkpoint that is not, or no longer, what was written: the one before it can stand in for it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it crosses to other ranks
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: choose another checkpoint"


def unread(path: Path, error: OSError) -> CheckpointError:
    """Of a checkpoint of which a file could not be read: is it damaged, or may or can nobody look now?"""
    if error.errno not in _NOT_NOW:
        return DamagedError(path, f"a file of it cannot be read ({error.strerror or error})")
    remedy = ("let this user read it" if error.errno in (errno.EACCES, errno.EPERM) else
              "start again when it can be read")
    return CheckpointError(f"{error.filename or path}: {error.strerror}: {remedy}")


class TensorReader:
    """The tensors of one checkpoint directory; the index is read once. Not collective: each rank reads for itself."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._index, self.shapes = _read_index(self._path / INDEX)

    def check(self, shapes: Mapping[str, torch.Size], *, ignore: Collection[str]) -> None:
        """Compare the keys, but for those that start with one of `ignore`, and their shapes with what is wanted.

        Raises:
            CheckpointError: a key is missing, is extra, or has another shape.
        """
        saved = {key: shape for key, shape in self.shapes.items() if not key.startswith(tuple(ignore))}
        for keys, words in ((shapes.keys() - saved.keys(), "is missing"), (saved.keys() - shapes.keys(), "is extra")):
            if keys:
                self._refuse(f"{min(keys)} {words} ({len(keys)} such keys)")
        for key, shape in shapes.items():
            if saved[key] != shape:
                self._refuse(f"{key} has shape {tuple(saved[key])} there and {tuple(shape)} here")

    @property
    def files(self) -> set[str]:
        """Names of the files that hold the tensors."""
        return {info.relative_path for info in self._index.storage_data.values()}

    def read(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The tensors of these keys, in float32 on the CPU.

        Raises:
            CheckpointError: a file cannot be read.
        """
        # The steps of torch's dcp.load without its collectives, which would meet those of the engine's import.
        reader, planner = FileSystemReader(self._path), DefaultLoadPlanner()
        try:
            tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
            planner.set_up_planner(dict(tensors), self._index, is_coordinator=True)
            reader.set_up_storage_reader(self._index, is_coordinator=True)
            reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        except OSError as error:
            raise unread(self._path, error) from error
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            raise DamagedError(self._path, f"its tensors cannot be read ({first_sentence(error)})") from error
        return tensors

    def _refuse(self, difference: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is of another model: {difference}: choose another checkpoint, or the "
                              f"model section that it was saved with")


def _memory_format(kind: type, name: str) -> Any:
    """Stands for `getattr`, by which some releases of Python (3.11.2 is one) pickle the members of an enum."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it takes the attribute {name!r} of something else than a memory format")
    return _MEM_FORMAT_ENCODING[name]


class _IndexUnpickler(Unpickler):
    built = (Metadata, TensorStorageMetadata, TensorProperties, ChunkStorageMetadata, MetadataIndex, StorageMeta,
             _StorageInfo)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def _refuse_claims(directory: Path, index: Metadata, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse tensors of more numbers than are in the files: to hold them would take any memory."""
    claimed = sum(abs(math.prod(shape)) for shape in shapes.values())
    files = {info.relative_path for info in index.storage_data.values()}
    if claimed * torch.float32.itemsize > sum((directory / name).stat().st_size for name in files):
        raise pickle.UnpicklingError(f"its tensors have {claimed} numbers, more than its files hold")


def _read_index(path: Path) -> tuple[Metadata, dict[str, torch.Size]]:
    """The index, and the shape of each tensor in it."""
    try:
        with open_regular(path) as file:
            index = _IndexUnpickler(file).load()
        shapes = {key: entry.size for key, entry in index.state_dict_metadata.items()}
        outside = [info for info in index.storage_data.values() if Path(info.relative_path).name != info.relative_path]
        if outside:
            raise pickle.UnpicklingError(f"it refers to the file {outside[0].relative_path} outside the checkpoint")
        _refuse_claims(path.parent, index, shapes)
    except OSError as error:
        raise unread(path.parent, error) from error
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise DamagedError(path.parent, f"its index {INDEX} is refused, as damaged or not written by hyena_dist "
                                        f"({first_sentence(error)})") from error
    return index, shapes
