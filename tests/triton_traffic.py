"""Counts the bytes that kernels load and store in Triton's interpreter: for each program every address once, and none
that it has written itself before, because what it reads again is in a cache."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.runtime.interpreter import interpreter_builder as builder


class Traffic:
    """Of what is launched while it is counted, without some tensors: tables, which stay in a cache."""

    def __init__(self, without: list[Tensor]) -> None:
        self.bytes = 0
        self.launches = 0
        """Of kernels."""
        self._without = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in without]
        self._loaded: set[int] = set()
        self._stored: set[int] = set()
        self._sizes: dict[int, int] = {}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        start = GridExecutor.__call__
        load, store, begin = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

        def create_masked_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._loaded |= self._addresses(ptrs, mask) - self._stored
            return load(ptrs, mask, *rest)

        def create_masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._stored |= self._addresses(ptrs, mask)
            return store(ptrs, value, mask, *rest)

        def set_grid_idx(*place: int) -> None:
            self._end_program()
            begin(*place)

        def call(*arguments: Any, **options: Any) -> Any:
            self.launches += 1
            with _disable_current_modes():  # what the interpreter does for itself is no call of torch
                return start(*arguments, **options)

        with (patch.object(GridExecutor, "__call__", call),
              patch.object(builder, "create_masked_load", create_masked_load),
              patch.object(builder, "create_masked_store", create_masked_store),
              patch.object(builder, "set_grid_idx", set_grid_idx)):
            yield
        self._end_program()

    def _addresses(self, ptrs: Any, mask: Any) -> set[int]:
        found = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))[mask.data]
        for first, end in self._without:
            found = found[(found < first) | (found >= end)]
        addresses = set(found.ravel().tolist())
        self._sizes |= dict.fromkeys(addresses, ptrs.get_element_ty().primitive_bitwidth // 8)
        return addresses

    def _end_program(self) -> None:
        self.bytes += sum(self._sizes[address] for found in (self._loaded, self._stored) for address in found)
        self._loaded, self._stored, self._sizes = set(), set(), {}
