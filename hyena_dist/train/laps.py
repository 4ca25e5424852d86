"""The seconds of a step as its device takes them. On CUDA the host is far ahead of the device: its own clock would tell
how long the launches took, and waiting for the device would make it idle. And the rate that follows from them."""

import time
from collections import deque

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


WARM_STEPS = 3
"""Steps at the start of a process, and of every stage, that compile, allocate and fill caches: they are not steady."""
STEADY_STEPS = 100
"""The most steps that a steady rate is the mean of."""


class SteadyRate:
    """Tokens per second of the latest steps of a stage, without the first ones. Only the seconds of steps count, so
    that validations and saves between them do not."""

    def __init__(self) -> None:
        self._stage: int | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=STEADY_STEPS)
        self._warm = 0
        self.latest: float | None = None
        """The last rate that was known."""

    def add(self, *, stage: int, tokens: int, seconds: float) -> float | None:
        """The rate after one step more; None while the stage warms up.

        Args:
            stage: the number of the step's stage.
            tokens: of the step, over all ranks.
        """
        if stage != self._stage:
            self._stage, self._warm = stage, 0
            self._steps.clear()
        self._warm += 1
        if self._warm <= WARM_STEPS:
            return None
        self._steps.append((tokens, seconds))
        self.latest = sum(tokens for tokens, _ in self._steps) / sum(seconds for _, seconds in self._steps)
        return self.latest
