"""The one timing loop: sides that do the same work, interleaved, on fresh inputs that they share, after a warm-up."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Times:
    """Seconds of every turn of one side."""

    wall: list[float]
    """By the clock on a CPU, by CUDA events on a GPU."""
    cpu: list[float]
    """What all threads of the process worked: a neighbour on a shared machine moves it less than the clock."""

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu)


def interleaved(sides: Mapping[str, Callable[[Inputs], object]], inputs: Callable[[int], Inputs], *, rounds: int,
                device: torch.device) -> dict[str, Times]:
    """Time every side in every round, each round in another order, on `inputs(round)`; round 0 is the warm-up."""
    times: dict[str, Times] = {name: Times([], []) for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):
        given = inputs(turn)
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            wall, cpu = timed(lambda side=sides[name], given=given: side(given), device)
            if turn:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, seconds of the process on its CPUs) of one call; its result is freed after the time was taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        worked = time.process_time()
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize(device)
        seconds = start.elapsed_time(end) / 1e3
    else:
        worked, started = time.process_time(), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
    worked = time.process_time() - worked
    del result
    return seconds, worked


def ratio(side: list[float], ours: list[float]) -> float:
    """The median of side / ours, turn by turn: more than 1 is slower than ours."""
    return statistics.median(a / b for a, b in zip(side, ours, strict=True))
