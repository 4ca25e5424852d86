"""Dropout whose mask is a pure function of where an element stands, not of a generator's state.

An element is kept or dropped by a hash of (seed, step, site, window, token, channel), so the mask is the same however
the model is split over ranks, in recomputation, and after a resume; nothing of it is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import chunks

_MASK, _STATE, _OFFSET = 0xFFFFFFFF, 0x9E3779B1, 0x85EBCA6B


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of one forward pass depend on."""

    seed: int
    step: int
    windows: Tensor
    """int64 [B]: the global number of each row's window."""
    first_token: int = 0
    """Place in the window of the first token that this rank holds."""


def dropout(x: Tensor, p: float, key: DropoutKey, site: int) -> Tensor:
    """Zero elements of x [L, B, D] with probability p and scale the others by 1 / (1 - p).

    Args:
        site: number of the place in the model that drops; each draws its own mask.
    """
    if p == 0:
        return x
    rows = _hash(_hash(_hash(key.windows & _MASK, key.windows >> 32), key.step), key.seed * 1024 + site)
    return _Dropout.apply(x, p, rows, key.first_token)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, rows: Tensor, first_token: int) -> Tensor:
        ctx.p, ctx.rows, ctx.first_token = p, rows, first_token
        return _apply_mask(x, p, rows, first_token)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _apply_mask(dy, ctx.p, ctx.rows, ctx.first_token), None, None, None


def _apply_mask(x: Tensor, p: float, rows: Tensor, first_token: int) -> Tensor:
    length, batch, channels = x.shape
    y = torch.empty_like(x)
    columns = torch.arange(channels, device=x.device)
    for part in chunks(length, batch * channels, x.device):
        tokens = torch.arange(first_token + part.start, first_token + part.stop, device=x.device)[:, None]
        keep = _at_least(_hash(rows, tokens), columns, int(p * 2**32))
        torch.mul(x[part] * (1 / (1 - p)), keep, out=y[part])
    return y


def _at_least(state: Tensor, columns: Tensor, threshold: int) -> Tensor:
    """`_hash(state[..., None], columns) >= threshold`, in 32-bit numbers that wrap around: half the memory traffic."""
    x = _signed(state * _STATE + _OFFSET & _MASK)[..., None] + columns.int()
    half = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        # The shift of a negative number brings in ones.
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=half).bitwise_and_((1 << 32 - shift) - 1))
        if factor != 1:
            x.mul_(factor - (1 << 32) if factor >> 31 else factor)
    return x.add_(-(1 << 31)) >= threshold - (1 << 31)  # numbers in order, whose first bit is not their sign


def _signed(x: Tensor) -> Tensor:
    """32 bits in int64 -> the same bits in int32."""
    return (x - ((x >> 31) << 32)).int()


def _hash(state: Tensor, value: Tensor | int) -> Tensor:
    """Fold 32 bits of a value into a 32-bit state held in int64 (multipliers of the hash `lowbias32`, C. Wellons)."""
    x = (state * _STATE + value + _OFFSET) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
