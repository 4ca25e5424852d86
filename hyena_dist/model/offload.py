"""Keeps what the backward pass needs in the host's memory.

Copies run on a stream of their own beside the computation, one for each storage, and the backward pass, which needs
them in the opposite order, asks for the next ones before it needs them.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

PREFETCHED = 2
"""Storages that come back before they are needed."""


def on_host() -> saved_tensors_hooks:
    """A context in which tensors that are saved for the backward pass go to the host, and come back when it needs them.
    Weights stay where they are. On a CPU it costs a copy and gives nothing."""
    store = HostStore()
    return saved_tensors_hooks(store.pack, store.unpack)


class _Saved(NamedTuple):
    """A tensor as a view of its storage."""

    place: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostStore:
    """What one forward pass saved, in the order in which it did."""

    def __init__(self) -> None:
        self.copies: list[_Copy] = []
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, int]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        # A frozen weight takes no gradient, by which alone it could not be told from an activation.
        if isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        return _Saved(self._copy_of(tensor), tensor.dtype, tensor.shape, tensor.stride(),
                      int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        data = self.copies[saved.place].on_device()
        for copy in self.copies[max(0, saved.place - PREFETCHED) : saved.place][::-1]:
            copy.fetch()
        whole = torch.empty(0, dtype=saved.dtype, device=data.device).set_(data.untyped_storage())
        return whole.as_strided(saved.shape, saved.stride, saved.offset)

    def _copy_of(self, tensor: Tensor) -> int:
        """The place of the copy of its storage, which is made if there is none of its present content."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # while this lives, its number is not given out again
        key = reference.cdata, tensor._version
        if key not in self._known or self._known[key][0].expired():
            self._known[key] = reference, len(self.copies)
            self.copies.append(_Copy(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)))
        return self._known[key][1]


class _Copy:
    """The bytes of a storage on the host, and on the device from when they are fetched until they are asked for."""

    def __init__(self, data: Tensor) -> None:
        self._device = data.device
        self._host = torch.empty(len(data), dtype=torch.uint8, pin_memory=data.is_cuda)
        self._fetched: Tensor | None = None
        self._used = False
        with _beside(self._device):
            self._host.copy_(data, non_blocking=True)
        if data.is_cuda:
            data.record_stream(_stream(self._device))

    def fetch(self) -> None:
        """Start to bring the bytes back, unless they are on the way or have been there."""
        if self._fetched is None and not self._used:
            self._fetched = torch.empty_like(self._host, device=self._device, pin_memory=False)
            with _beside(self._device):
                self._fetched.copy_(self._host, non_blocking=True)

    def on_device(self) -> Tensor:
        self._used = False  # a storage of two tensors comes twice
        self.fetch()
        data, self._fetched, self._used = self._fetched, None, True
        assert data is not None
        if data.is_cuda:
            torch.cuda.current_stream(self._device).wait_stream(_stream(self._device))
        return data


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside(device: torch.device) -> AbstractContextManager:
    """A context whose work follows what was asked of the device so far, on another stream."""
    if device.type != "cuda":
        return nullcontext()
    _stream(device).wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(_stream(device))
