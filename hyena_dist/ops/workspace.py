"""Memory for what lives as long as one chunk."""

import math

import torch
from torch import Tensor


class Workspace:
    """Temporaries of an operator's chunks, each of which uses the memory of the one before. A CPU's allocator gives out
    freed blocks in turn, and so cold ones: the cache holds what is used again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._places: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, good until the next one of this name."""
        size, place = math.prod(shape), self._places.get(name)
        if place is None or len(place) < size:
            place = self._places[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return place[:size].view(shape)
