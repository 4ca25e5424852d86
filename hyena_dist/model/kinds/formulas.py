"""What formulas of costs are made of: operations and elements of a part of the model.

A matrix product of [m, k] by [k, n] is 2 m k n operations, as torch's FlopCounterMode counts; a complex FFT of N points
is 5 N log2 N, as FFTW counts.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hyena_dist.config.context import choose_method, exchanged_rows

if TYPE_CHECKING:
    from hyena_dist.config.schema import Config

FP32 = 4
"""Bytes of an element of the residual stream, of the filters, of weights, and of the gradients of all three."""


class Split(NamedTuple):
    """How one sequence and one model are cut over ranks, as far as a rank's costs depend on it."""

    tensor: int = 1
    """Ranks over which channels are split."""
    context: int = 1
    """Ranks over which tokens are split."""
    sequence: bool = False
    """Whether the residual stream is split over the tensor ranks too."""
    method: str = ""
    """How convolutions cross the context ranks: all_to_all or distributed_fft; empty where there is one."""

    @classmethod
    def of(cls, config: "Config", micro_batch_size: int) -> "Split":
        """Of a run's configuration, at a micro-batch of this size, on which parallel.context_method=auto depends."""
        parallel = config.parallel
        if parallel.context == 1:
            return cls(parallel.tensor, 1, parallel.sequence)
        rows = exchanged_rows(channels=config.model.hidden_size // parallel.tensor, batch=micro_batch_size,
                              groups=parallel.overlap_groups)
        return cls(parallel.tensor, parallel.context, parallel.sequence,
                   choose_method(parallel.context_method, rows=rows, ranks=parallel.context))


WHOLE = Split()


class Shape(NamedTuple):
    """Of a weight on one tensor rank."""

    dims: tuple[int, ...]
    decayed: bool = True
    """Whether it is in the optimizer's group with weight decay."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def rows(self) -> int:
        return self.dims[0]


@dataclass(frozen=True)
class Part:
    """One part of the model in a forward pass of a micro-batch."""

    flops: float
    inputs: float
    """Elements that it must read at least: activations and weights."""
    outputs: float
    """Elements that it must write at least."""

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.inputs + other.inputs, self.outputs + other.outputs)

    def __mul__(self, count: int) -> "Part":
        return Part(count * self.flops, count * self.inputs, count * self.outputs)


NOTHING = Part(0.0, 0.0, 0.0)


def product(tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Part:
    """A matrix product with a weight."""
    return Part(2.0 * tokens * inputs * outputs, tokens * inputs + inputs * outputs + bias * outputs, tokens * outputs)


def product_bytes(tokens: int, inputs: int, outputs: int, itemsize: int) -> float:
    """The fewest bytes of a matrix product with a weight, forward and backward, whose elements are of `itemsize`."""
    return itemsize * tokens * (3 * inputs + 2 * outputs) + 3 * FP32 * (inputs + 1) * outputs


def fft_flops(size: int) -> float:
    """Operations of a complex FFT. The right-angle convolution has one of N = next_fast_len(L) points for each real
    channel; a real FFT of 2L points, as in the padded convolution, is half of a complex one of 2L: about as many."""
    return 5.0 * size * math.log2(size)


def ring(kind: str, size: int, ranks: int) -> int:
    """Bytes that a rank sends in a collective over a ring: `size` is of the tensor that it gives."""
    away = ranks - 1
    return {"all_reduce": 2 * away * size // ranks, "reduce_scatter": away * size // ranks,
            "all_to_all": away * size // ranks, "all_gather": away * size}[kind]
