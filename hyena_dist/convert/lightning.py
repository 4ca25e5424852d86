"""State dicts in torch's files, Lightning's checkpoints among them, read without running anything in them."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor
from torch.serialization import _is_zipfile as is_zipfile

from hyena_dist.config.errors import first_sentence
from hyena_dist.config.plain import open_regular
from hyena_dist.config.unpickle import Unpickler
from hyena_dist.convert.section import ConversionError

STATE_DICTS = ("state_dict", "model_state_dict", "module", "model")
"""Under which names a checkpoint has the weights: Lightning's, that of PyTorch's tutorials, DeepSpeed's, others'."""


def load_lightning(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published Lightning checkpoint (weights.ckpt), read without running anything in it.

    The pickle may name any class (OmegaConf objects, loop states); all but tensors and plain containers become inert
    placeholders and are thrown away.

    Raises:
        ConversionError: unreadable, not a checkpoint, or without a `state_dict` of tensors.
    """
    try:
        state = _load(Path(path), _TENSORS_ONLY)["state_dict"]
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        raise ConversionError(f"{path}: not a readable Lightning checkpoint with a state_dict: "
                              f"{first_sentence(error)}") from error
    if not _is_state_dict(state):
        raise ConversionError(f"{path}: its state_dict holds more than tensors, or nothing")
    return dict(state)


def load_torch(path: Path) -> dict[str, Tensor]:
    """The state dict that a file of torch.save is, or that it has under one of STATE_DICTS. It is read by torch's
    weights-only reader, and where that refuses a class, as `load_lightning` does.

    Raises:
        ConversionError: unreadable, or without such a state dict.
    """
    try:
        try:
            content = _load(path)
        except pickle.UnpicklingError:
            content = _load(path, _TENSORS_ONLY)
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        raise ConversionError(f"{path}: no readable file of weights ({first_sentence(error)}): it is cut short or "
                              f"damaged, or no file of torch.save: fetch it again") from error
    candidates = [content, *(content.get(name) for name in STATE_DICTS)] if isinstance(content, Mapping) else []
    for candidate in candidates:
        if _is_state_dict(candidate):
            return dict(candidate)
    for candidate in candidates:
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            strange = [key for key, value in candidate.items() if not _is_state_dict({key: value})]
            raise ConversionError(f"{path}: {strange[0]!r} stands among its weights and is no tensor by name "
                                  f"({len(strange)} such in all): save the model's state_dict() without")
    raise ConversionError(f"{path}: holds no tensors by name, be it as they are or under one of "
                          f"{', '.join(STATE_DICTS)}: save the state_dict() of the model")


def _is_state_dict(value: Any) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


def _load(path: Path, pickle_module: Any = None) -> Any:
    """What is in a file of torch.save, by torch's weights-only reader or by that of a pickle module."""
    with open_regular(path) as file:  # once: what is checked is what is read
        check_archive(file)
        _refuse_program(file)
        return torch.load(file, map_location="cpu", weights_only=pickle_module is None, pickle_module=pickle_module)


def check_archive(file: BinaryIO) -> None:
    """Compare the records of torch's archive with their checksums, which torch does not.

    Raises:
        pickle.UnpicklingError: one is damaged.
        zipfile.BadZipFile: it is no such archive, though it begins as one.
    """
    if is_zipfile(file):
        damaged = zipfile.ZipFile(file).testzip()
        if damaged is not None:
            raise pickle.UnpicklingError(f"its record {damaged} is damaged (CRC-32)")
    file.seek(0)


def _refuse_program(file: BinaryIO) -> None:
    """torch.load hands a TorchScript archive to torch.jit.load, which runs it. Told apart as torch.load does: another
    reader of zip files could be made to see other records."""
    if is_zipfile(file) and "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records():
        raise pickle.UnpicklingError("it is a TorchScript program")
    file.seek(0)


class _Inert:
    """Stands for any object of a pickle that is neither a tensor nor a plain container."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> "_Inert":
        return self


class _TensorUnpickler(Unpickler):
    built = (_Inert, OrderedDict)
    _allowed = {("collections", "OrderedDict"): OrderedDict,
                ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
                ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter}

    def find_class(self, module: str, name: str) -> Any:
        # Storage types are handled by torch.load before it asks here.
        return self._allowed.get((module, name), _Inert)


def _no_legacy_format(*_args: Any, **_kwargs: Any) -> None:
    raise pickle.UnpicklingError("it is no archive of torch.save")


_TENSORS_ONLY = SimpleNamespace(__name__="tensors_only", Unpickler=_TensorUnpickler, load=_no_legacy_format)
"""What torch.load needs of a pickle module."""
