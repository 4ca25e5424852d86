"""Tables of the transform of N = n1 n2 points in two factors, with the right-angle convolution's twist in them.

With n = i n2 + j and k = p + n1 q the twisted transform X[k] = sum_n u[n] exp(-2 pi i n (k - 1/4) / N) is

    X[p, q] = sum_j right[j, q] twiddle[p, j] sum_i left[p, i] u[i, j]
    left = exp(-2 pi i i (p - 1/4) / n1), right = exp(-2 pi i j q / n2)
    twiddle = exp(-2 pi i j (p - 1/4) / N) / sqrt(n1)

so that the twist costs nothing. n1 need not be a power of two: the left table ends in zeros. A table's elements are
float16; a precise one has what float16 leaves over beside it. Real and imaginary parts are planes.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def left_table(n1: int, padded: int, twisted: bool, precise: bool, device: torch.device) -> Tensor:
    """[2 or 4, padded, padded] float16: real, imaginary, and what is left over of both."""
    table = torch.zeros(2, padded, padded, dtype=torch.float64)
    p, i = torch.arange(n1)[:, None], torch.arange(n1)
    table[:, :n1, :n1] = _roots((4 * p - int(twisted)) * i, 4 * n1)
    return _halves(table, precise).to(device)


@lru_cache(maxsize=32)
def right_table(n2: int, precise: bool, device: torch.device) -> Tensor:
    """[2 or 4, n2, n2], as `left_table`."""
    j = torch.arange(n2)
    return _halves(_roots(j[:, None] * j, n2), precise).to(device)


@lru_cache(maxsize=32)
def twiddles(n1: int, n2: int, padded: int, twisted: bool, precise: bool, device: torch.device) -> Tensor:
    """[2, padded, n2], float16, a precise one float32; zeros from row n1 on."""
    table = torch.zeros(2, padded, n2, dtype=torch.float32 if precise else torch.float16)
    p, j = torch.arange(n1)[:, None], torch.arange(n2)
    table[:, :n1] = _roots((4 * p - int(twisted)) * j, 4 * n1 * n2) / math.sqrt(n1)
    return table.to(device)


def _roots(numerator: Tensor, denominator: int) -> Tensor:
    """[2, ...]: real and imaginary parts of exp(-2 pi i numerator / denominator), reduced in integers: exact."""
    angle = (numerator % denominator).double() * (-2 * math.pi / denominator)
    return torch.stack([angle.cos(), angle.sin()])


def _halves(table: Tensor, precise: bool) -> Tensor:
    high = table.half()
    return torch.cat([high, (table - high.double()).half()]) if precise else high
