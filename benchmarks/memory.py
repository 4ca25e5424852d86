"""Peak memory of the tensors that live during a piece of code: saved tensors and workspace, not the interpreter."""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
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

    Backward passes inside the block count, and so does what is saved for one. On a CPU a storage counts once, however
    many views it has; what an operator allocates and frees inside itself is not seen, nor are tensors made of Python
    data. On CUDA it is the allocator's number, which holds all of that.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    with _StorageCounter() as counter:
        yield peak
    peak.bytes = counter.peak


class _StorageCounter(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed. The autograd engine runs the backward pass of a
    CPU graph on the thread that called it, so the mode sees that too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._freed: deque[tuple[int, int]] = deque()  # storages may die on a thread of gloo: appending is atomic

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._settle()
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key in given or key in self._known:
                continue
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed.append, (key, storage.nbytes())).atexit = False
        self.peak = max(self.peak, self.live)
        return result

    def _settle(self) -> None:
        while self._freed:
            key, size = self._freed.popleft()
            self._known.remove(key)
            self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
