"""The seconds of a step as its device takes them. On CUDA the host is far ahead of the device: its own clock would tell
how long the launches took, and waiting for the device would make it idle."""

import time

import torch


class Laps:
    """Moments of a step: `mark` sets one where the device is to pass it; the first is that of making this."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        """A moment after all work that was given to the device so far; waits for nothing."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.monotonic())

    def seconds(self, first: int, last: int) -> float:
        """From one moment to a later one, by their numbers. Only once the device has passed both, which it has when a
        number that was computed after them has been read."""
        start, end = self._marks[first], self._marks[last]
        if isinstance(start, float):
            assert isinstance(end, float)
            return end - start
        assert not isinstance(end, float)
        return start.elapsed_time(end) / 1e3
