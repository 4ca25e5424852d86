"""Peak memory of the tensors that live during a piece of code: saved tensors and workspace, not the interpreter."""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


@dataclass
class Peak:
    """Filled when the block ends."""

    bytes: int = 0


@contextmanager
def peak_tensor_bytes(device: torch.device = CPU) -> Iterator[Peak]:
    """The largest total size of tensors that lived at one time inside the block and were made in it.

    Backward passes inside the block count, and so does what is saved for one. On a CPU, and on meta, a storage
    counts once, however many views it has; what an operator allocates and frees inside itself is not seen, nor are
    tensors made of Python data. On CUDA it is the allocator's number, which holds all of that.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    with _StorageCounter(device) as counter:
        yield peak
    peak.bytes = counter.peak


class _StorageCounter(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed. The autograd engine runs the backward pass of a
    CPU graph on the thread that called it, so the mode sees that too. FSDP2 frees gathered weights by making their
    storages empty, which is no operator: that is followed as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._freed: deque[int] = deque()  # storages may die on a thread of gloo: appending is atomic

    def __enter__(self) -> "_StorageCounter":
        resize, counter = torch.UntypedStorage.resize_, self

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            counter._resized(storage)
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", followed)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a distributed tensor says that it is as large as all of its shards together
        result = func(*args, **(kwargs or {}))
        self._settle()
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key in given or key in self._sizes or storage.device.type != self._device:
                continue
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed.append, key).atexit = False
        self.peak = max(self.peak, self.live)
        return result

    def _settle(self) -> None:
        while self._freed:
            self.live -= self._sizes.pop(self._freed.popleft())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        self._settle()
        if storage._cdata in self._sizes:
            self.live += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
