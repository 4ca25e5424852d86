"""How much of the devices a run uses: the two shares that its metrics report."""

import statistics
import time
from typing import NamedTuple

import torch

from hyena_dist.config.schema import Config
from hyena_dist.costs.flops import mfu, parts, peak_flops, training_bytes

COPY_BYTES = 2**28
"""Size of the copied tensor: far more than a cache."""
_COPIES = 5


class Shares(NamedTuple):
    """Of what all devices could have done in the time; null where the device's limit is not known."""

    mfu: float | None
    """Model FLOPs utilisation, of the maker's peak of dense matrix products."""
    bandwidth: float | None
    """Of the bytes that a copy of the same time moves: what every part must read and write at least, by formula."""


class Utilisation:
    """Shares by the formulas of `flops.py`, at this run's model, precision and number of devices.

    Args:
        peak: operations per second of one device; None: not known.
        bandwidth: bytes per second of one device; None: not known.
    """

    def __init__(self, config: Config, world_size: int, *, peak: float | None, bandwidth: float | None) -> None:
        self._config, self._world_size, self._peak, self._bandwidth = config, world_size, peak, bandwidth

    @classmethod
    def of_device(cls, config: Config, world_size: int, device: torch.device) -> "Utilisation":
        """With the limits of a CUDA device; those of a CPU are shared with whatever else runs there, and not known."""
        if device.type != "cuda":
            return cls(config, world_size, peak=None, bandwidth=None)
        peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision)
        return cls(config, world_size, peak=peak, bandwidth=copy_bandwidth(device))

    def shares(self, *, seq_len: int, micro_batch_size: int, tokens_per_second: float) -> Shares:
        """At a rate over all devices."""
        section = self._config.model
        used_flops = used_bytes = None
        if self._peak is not None:
            used_flops = mfu(section, seq_len, tokens_per_second=tokens_per_second, micro_batch_size=micro_batch_size,
                             peak=self._peak * self._world_size)
        if self._bandwidth is not None:
            itemsize = 4 if self._config.train.precision == "fp32" else 2
            per_batch = sum(training_bytes(part, itemsize)
                            for part in parts(section, seq_len, micro_batch_size).values())
            used_bytes = (tokens_per_second * per_batch / (micro_batch_size * seq_len)
                          / (self._bandwidth * self._world_size))
        return Shares(used_flops, used_bytes)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a large copy on this device: the most that any operator that
    goes through memory can reach. The device's peak of allocated memory starts anew."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES + 1):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    del source, target
    if device.type == "cuda":  # else they stay the least of every peak that is reported
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * COPY_BYTES / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
