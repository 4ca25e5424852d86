"""Reads tensors from torch's distributed checkpoint files without trusting who wrote them.

torch unpickles the index file `.metadata` without restriction, and entries that are not tensors as well. Here the index
may name only the classes that describe tensors, and only tensors are read (torch loads those with weights_only).
"""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from hyena_dist.config.errors import UserError, first_sentence

REMEDY = "delete it to resume the one before, or choose another"
"""For a checkpoint that is taken for whole and cannot be used."""

_INDEX = ".metadata"
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


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the path, the reason and the remedy."""


class TensorReader:
    """The tensors of one checkpoint directory; the index is read once. Not collective: each rank reads for itself."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._index, self.shapes = _read_index(self._path / _INDEX)

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

    def read(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The tensors of these keys, in float32 on the CPU.

        Raises:
            CheckpointError: a file cannot be read.
        """
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
        # The steps of torch's dcp.load without its collectives, which would meet those of the engine's import.
        reader, planner = FileSystemReader(self._path), DefaultLoadPlanner()
        try:
            planner.set_up_planner(dict(tensors), self._index, is_coordinator=True)
            reader.set_up_storage_reader(self._index, is_coordinator=True)
            reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            raise CheckpointError(f"{self._path}: its tensors cannot be read ({first_sentence(error)}): "
                                  f"{REMEDY}") from error
        return tensors

    def _refuse(self, difference: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is of another model: {difference}: choose another checkpoint, or the "
                              f"model section that it was saved with")


def _memory_format(kind: type, name: str) -> Any:
    """Stands for `getattr`, by which some releases of Python (3.11.2 is one) pickle the members of an enum."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it takes the attribute {name!r} of something else than a memory format")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def _read_index(path: Path) -> tuple[Metadata, dict[str, torch.Size]]:
    """The index, and the shape of each tensor in it."""
    try:
        with path.open("rb") as file:
            index = _Unpickler(file).load()
        shapes = {key: entry.size for key, entry in index.state_dict_metadata.items()}
        outside = [info for info in index.storage_data.values() if Path(info.relative_path).name != info.relative_path]
        if outside:
            raise pickle.UnpicklingError(f"it refers to the file {outside[0].relative_path} outside the checkpoint")
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise CheckpointError(f"{path.parent}: its index {_INDEX} is refused, as damaged or not written by hyena_dist "
                              f"({first_sentence(error)}): {REMEDY}") from error
    return index, shapes
