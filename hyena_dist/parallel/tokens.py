"""Slices of the token dimension: padded once on the right, cut into equal contiguous pieces, one per context rank."""

import math

import torch.nn.functional as F
from torch import Tensor

from hyena_dist.parallel.distributed_fft import length_multiple
from hyena_dist.parallel.groups import Axis


def token_multiple(*, context: int, tensor: int = 1, sequence: bool = False) -> int:
    """What a padded sequence's length is a multiple of: slices are equal, fit the distributed transform, and are split
    evenly over the tensor ranks by sequence parallelism."""
    return math.lcm(length_multiple(context), context * (tensor if sequence else 1))


def padded_length(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def slice_tokens(x: Tensor, axis: Axis, *, multiple: int, fill: int) -> Tensor:
    """[B, L] -> [B, L' / P]: this context rank's piece of a sequence padded with `fill` on the right to L'."""
    padded = F.pad(x, (0, padded_length(x.shape[1], multiple) - x.shape[1]), value=fill)
    return padded.chunk(axis.size, dim=1)[axis.rank]


def part_of_window(length: int, axis: Axis, *, multiple: int) -> tuple[int, int, int]:
    """The first token and the number of tokens that are this context rank's of windows of a length, its slice of what
    `slice_tokens` cuts; and how many all ranks have."""
    padded = padded_length(length, multiple)
    tokens = padded // axis.size
    return axis.rank * tokens, tokens, padded
