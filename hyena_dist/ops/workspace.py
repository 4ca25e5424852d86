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
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, good until the next one of this name."""
        view = self._views.get((name, shape))
        if view is None:
            size, place = math.prod(shape), self._places.get(name)
            if place is None or len(place) < size:
                place = self._places[name] = torch.empty(size, dtype=self._dtype, device=self._device)
                self._views = {key: view for key, view in self._views.items() if key[0] != name}  # the old place's
            view = self._views[name, shape] = place[:size].view(shape)
        return view

    def clear(self) -> None:
        """Give the memory back, before something else needs it."""
        self._places.clear()
        self._views.clear()
