"""Refuses, in Triton's interpreter, every address of an active lane that lies outside the tensor whose pointer it was
made from. The interpreter itself reads and writes anywhere: what is read outside and masked away later leaves no trace
there, and ends a GPU's kernel in an illegal memory access.

Tensors on meta have addresses and no memory: of a launch with such a tensor only the first and the last program of the
grid run, what they load is 0 and what they store is dropped. So the addresses of any size are checked, whatever memory
the machine has: offsets of 32 bits that overflow end outside.

`check` is called once, before anything is launched, and holds for the whole process.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, TensorHandle
from triton.runtime.interpreter import interpreter_builder as builder

CARRIES = {"create_addptr": 0, "create_broadcast": 0, "create_expand_dims": 0, "create_splat": 1}
"""What makes pointers of a pointer, and which argument that is."""
REACHES = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3),
           "create_atomic_cas": (0, None)}
"""What goes to memory, and which arguments are its pointers and its mask."""
MOST_PROGRAMS = 2**31 - 1, 65535, 65535
"""Of CUDA's grids, along each axis."""
FAR = 2**44
"""Bytes between the tensors on meta."""


class OutsideError(Exception):
    """An address outside its tensor, or a grid that is too large."""


@dataclass(frozen=True)
class Memory:
    """What a tensor of a launch spans: addresses from its first element to the end of its last one."""

    first: int
    end: int
    kernel: str
    name: str
    dry: bool
    """On meta."""

    def hold(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Addresses of elements of `size` bytes.

        Raises:
            OutsideError: names the kernel, the argument, and how far the furthest is outside.
        """
        lowest, highest = int(pointers.min()), int(pointers.max())
        if lowest < self.first or highest + size > self.end:  # perhaps in lanes that are masked away
            active = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[mask]
            lowest, highest = int(active.min(initial=self.first)), int(active.max(initial=self.end - size))
        for side, distance in (("before", self.first - lowest), ("after", highest + size - self.end)):
            if distance > 0:
                raise OutsideError(f"{self.kernel}: {-(-distance // size):,} elements {side} {self.name}")


class _Launches:
    """Every launch of the process, and the one under way."""

    def __init__(self) -> None:
        self.kernel, self.tensors = "", {}
        self._bases: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._run, self._convert = GridExecutor.__call__, interpreter._implicit_cvt

    def launch(self, executor: GridExecutor, *args: Any, **options: Any) -> None:
        given = dict(zip(executor.arg_names, args, strict=False)) | options
        self.kernel, self.tensors = executor.fn.__name__, {k: t for k, t in given.items() if isinstance(t, Tensor)}
        grid = executor.grid(given) if callable(executor.grid) else executor.grid
        if any(n > most for n, most in zip(grid, MOST_PROGRAMS, strict=False)):
            raise OutsideError(f"{self.kernel}: a grid of {grid}")
        if any(t.is_meta for t in self.tensors.values()):
            self._ends(executor, (*grid, 1, 1)[:3], {k: v for k, v in given.items() if k in executor.arg_names})
        else:
            self._run(executor, *args, **options)

    def _ends(self, executor: GridExecutor, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        scope = interpreter._patch_lang(executor.fn)
        try:
            given = {name: value if name in executor.constexprs else self.converted(value)
                     for name, value in inspect.getcallargs(executor.fn, **given).items()}
            builder.set_grid_dim(*grid)
            for place in {(0, 0, 0), tuple(n - 1 for n in grid)} if min(grid) else ():
                builder.set_grid_idx(*place)
                executor.fn(**given)
        finally:
            scope.restore()

    def converted(self, value: Any) -> Any:
        """An argument as the interpreter passes it on, which carries its Memory."""
        if not isinstance(value, Tensor):
            return self._convert(value)
        memory = self._memory(value)
        kind = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
        return tl.tensor(TensorHandle(np.array([memory.first], dtype=np.uint64), kind, {"memory": memory}), kind)

    def _memory(self, tensor: Tensor) -> Memory:
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        first = self._base(tensor) if tensor.is_meta else tensor.data_ptr()
        shown = tensor.shape, tensor.stride(), tensor.storage_offset()
        names = [name for name, t in self.tensors.items() if (t.shape, t.stride(), t.storage_offset()) == shown
                 and t.data_ptr() == tensor.data_ptr()]
        return Memory(first, first + (elements if tensor.numel() else 0) * tensor.itemsize, self.kernel, names[0],
                      tensor.is_meta)

    def _base(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        base, _ = self._bases.setdefault(storage._cdata, (FAR * (len(self._bases) + 1), storage))
        return base + tensor.storage_offset() * tensor.itemsize


def check() -> None:
    """See the module."""
    launches = _Launches()
    GridExecutor.__call__ = lambda executor, *args, **options: launches.launch(executor, *args, **options)
    interpreter._implicit_cvt = launches.converted
    for name, place in CARRIES.items():
        setattr(builder, name, _carrying(getattr(builder, name), place))
    for name, places in REACHES.items():
        setattr(builder, name, _held(getattr(builder, name), *places))


def _carrying(operation: Callable[..., TensorHandle], place: int) -> Callable[..., TensorHandle]:
    def carried(*args: Any) -> TensorHandle:
        result = operation(*args)
        if "memory" in args[place].attr:
            result.attr["memory"] = args[place].attr["memory"]
        return result
    return carried


def _held(operation: Callable[..., Any], pointers_at: int, mask_at: int | None) -> Callable[..., Any]:
    def held(*args: Any, **options: Any) -> Any:
        pointers = args[pointers_at]
        memory, kind = pointers.attr["memory"], pointers.get_element_ty()
        memory.hold(pointers.data, np.True_ if mask_at is None else args[mask_at].data, kind.primitive_bitwidth // 8)
        if memory.dry:
            return TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)
        return operation(*args, **options)
    return held


@triton.jit
def one_element_off(X, Y, OFF: tl.constexpr, AT: tl.constexpr, COUNT: tl.constexpr):
    """A control: of the elements that are read, the first or last is outside X, and is not used."""
    n = tl.arange(0, COUNT)
    x = tl.load(X + n + OFF, mask=n < AT, other=0.0)
    tl.store(Y + n, tl.where((n + OFF >= 0) & (n + OFF < COUNT), x, 0.0))


@triton.jit
def far_row(X, ROW, STRIDE, COUNT: tl.constexpr):
    """A control: where ROW * STRIDE is 2^31 elements or more, an offset of 32 bits overflows."""
    n = tl.arange(0, COUNT)
    tl.store(X + ROW * STRIDE + n, 1.0)


def controls() -> dict[str, float]:
    """What is outside is refused, in memory and on meta, and nothing else."""
    x, far = torch.zeros(4, 16), torch.zeros(3, 2**30, device="meta")
    first, last = x[1], x[2]
    inside = [lambda: one_element_off[(1,)](first, last, OFF=1, AT=15, COUNT=16),
              lambda: one_element_off[(1,)](first, last, OFF=0, AT=16, COUNT=16),
              lambda: far_row[(1,)](far, 1, 2**30, COUNT=16)]
    outside = {"1 elements after X": lambda: one_element_off[(1,)](first, last, OFF=1, AT=16, COUNT=16),
               "1 elements before X": lambda: one_element_off[(1,)](last, first, OFF=-1, AT=16, COUNT=16),
               f"{2**31:,} elements before X": lambda: far_row[(1,)](far, 2, 2**30, COUNT=16),
               "a grid of (1, 65536)": lambda: far_row[(1, 65536)](far, 0, 1, COUNT=16)}
    for work in inside:
        work()
    for message, work in outside.items():
        with pytest.raises((InterpreterError, OutsideError), match=re.escape(message)):
            work()
    return {"y": 1.0}
