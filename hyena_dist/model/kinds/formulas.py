"""What formulas of costs are made of: operations and elements of a part of the model.

A matrix product of [m, k] by [k, n] is 2 m k n operations, as torch's FlopCounterMode counts; a complex FFT of N points
is 5 N log2 N, as FFTW counts.
"""

import math
from dataclasses import dataclass

FP32 = 4
"""Bytes of an element of the residual stream, of the filters, of weights, and of the gradients of all three."""


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
