"""Numbers of the device that are read later, without waiting for what the device was given since."""

from collections.abc import Mapping

import torch
from torch import Tensor


class LateNumbers:
    """Copies of 0-dim tensors on their way to the host.

    `float(tensor)` waits for everything that its stream was given so far, the step that was queued since included. A
    copy into pinned memory with an event behind it waits for what came before it only.

    Args:
        scalars: 0-dim tensors by name, on a device or on the host; copied as float64.
    """

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self._here = {name: scalar.detach() for name, scalar in scalars.items() if scalar.device.type == "cpu"}
        self._names = [name for name in scalars if name not in self._here]
        if self._names:
            stacked = torch.stack([scalars[name].detach().double() for name in self._names])
            self._values = torch.empty(len(self._names), dtype=torch.float64, pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._passed = torch.cuda.Event()
            self._passed.record(torch.cuda.current_stream(stacked.device))

    def read(self) -> dict[str, float]:
        """The numbers by name; waits until the device has passed them."""
        numbers = {}
        for name, scalar in self._here.items():
            numbers[name] = float(scalar)
        if self._names:
            self._passed.synchronize()
            numbers |= zip(self._names, self._values.tolist(), strict=True)
        return numbers
