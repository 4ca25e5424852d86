"""The state dict of a published Lightning checkpoint, read without running anything in it."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import _is_zipfile as is_zipfile

from hyena_dist.config.plain import open_regular
from hyena_dist.config.unpickle import Unpickler
from hyena_dist.convert.section import ConversionError


def load_lightning(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published Lightning checkpoint (weights.ckpt), read without running anything in it.

    The pickle may name any class (OmegaConf objects, loop states); all but tensors and plain containers become inert
    placeholders and are thrown away.

    Raises:
        ConversionError: unreadable, not a checkpoint, or without a `state_dict` of tensors.
    """
    try:
        with open_regular(path) as file:  # once: what is checked is what is read
            check_archive(file)
            _refuse_program(file)
            content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ONLY)
        state = dict(content["state_dict"])
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        raise ConversionError(f"{path}: not a readable Lightning checkpoint with a state_dict: {error}") from error
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ConversionError(f"{path}: its state_dict holds more than tensors")
    return state


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
    raise pickle.UnpicklingError("torch's format from before 1.6 is not read")


_TENSORS_ONLY = SimpleNamespace(__name__="tensors_only", Unpickler=_TensorUnpickler, load=_no_legacy_format)
"""What torch.load needs of a pickle module."""
