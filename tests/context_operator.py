"""The operator over context ranks: what one rank computes of it, by either backend, in any precision."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyena_dist.model.context import AllToAll
from hyena_dist.ops.hyena import HyenaWeights, hyena
from hyena_dist.parallel.groups import Axis

CPU = torch.device("cpu")
NAMES = ("y", "x", "in_weight", "in_bias", "short_weight", "short_bias", "filters", "bias", "out_weight", "out_bias")


@dataclass(frozen=True)
class Sizes:
    """`length` is that of a rank's slice, `width` that of the residual stream."""

    length: int
    batch: int
    width: int
    channels: int


def computed(axis: Axis, backend: str, dtype: torch.dtype, sizes: Sizes, order: int = 2, *,
             device: torch.device = CPU, lowered: torch.dtype | None = None,
             **options: Any) -> dict[str, Tensor]:
    """This rank's result, and its part of every gradient, with weights in `dtype` and, where `lowered` is given, under
    autocast to it. The numbers drawn are the same for every backend, precision and rank."""
    exchange = AllToAll(axis, batch=sizes.batch, channels=sizes.channels, groups=2, backend=backend)
    draw, whole, rows = torch.Generator().manual_seed(7), axis.size * sizes.length, (order + 1) * sizes.channels
    shapes = [(whole, sizes.batch, sizes.width), (rows, sizes.width), (rows,), (rows, 3), (rows,),
              (order - 1, sizes.channels, whole), (order - 1, sizes.channels), (sizes.width, sizes.channels),
              (sizes.width,), (whole, sizes.batch, sizes.width)]
    x, *weights, dy = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
    weights[4] = torch.cat([weights[4][:, part] for part in exchange.channels], dim=1)
    x, dy = (t.chunk(axis.size)[axis.rank].contiguous() for t in (x, dy))
    leaves = [t.requires_grad_() for t in (x, *weights)]
    with torch.autocast(device.type, lowered) if lowered else nullcontext():
        y = hyena(leaves[0], HyenaWeights(*leaves[1:]), backend=backend, exchange=exchange, **options)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))
