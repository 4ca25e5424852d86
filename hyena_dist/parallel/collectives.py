"""Collectives with gradients, one path on every device. Over an axis of one rank each is the identity.

Every function says what goes in and out on each rank, `[local] -> [local]`, and what its backward does. T stands for
the size of the axis. Half-precision data travels as it is. `count_bytes` tells what a piece of code sends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.parallel.groups import Axis


@dataclass(eq=False)
class Traffic:
    """Bytes that this rank sent, by kind of collective."""

    sent: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.sent.values())


# torch 2.13 renamed the two and warns at each call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_counting: list[Traffic] = []  # not a context variable: on CUDA backward passes run in threads of their own


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count what the collectives of this module send from this rank inside the block, backward passes included."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _sent(kind: str, tensor: Tensor, peers: float) -> None:
    for traffic in _counting:
        traffic.sent[kind] = traffic.sent.get(kind, 0) + int(tensor.numel() * tensor.element_size() * peers)


# Plain collectives on tensors, no gradient


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """[...] -> [...], the sum over the axis; a new tensor."""
    y = x.clone(memory_format=torch.contiguous_format)
    _sent("all_reduce", y, 2 * (axis.size - 1) / axis.size)
    dist.all_reduce(y, group=axis.group)
    return y


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """[..., n, ...] -> [..., T n, ...]: the ranks' pieces, concatenated along `dim` in rank order."""
    x = x.contiguous()
    _sent("all_gather", x, axis.size - 1)
    pieces = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    _all_gather(pieces, x, group=axis.group)
    return pieces.unflatten(0, (axis.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """[..., T n, ...] -> [..., n, ...]: this rank's piece of the sum over the axis."""
    pieces = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    _sent("reduce_scatter", pieces, (axis.size - 1) / axis.size)
    y = torch.empty_like(pieces[0])
    _reduce_scatter(y, pieces.flatten(0, 1), group=axis.group)
    return y


def start_all_to_all(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work]:
    """x [T, ...]: piece i goes to rank i; the result's piece i is from rank i, and is there after `wait`."""
    x = x.contiguous()
    _sent("all_to_all", x, (axis.size - 1) / axis.size)
    y = torch.empty_like(x)
    work = dist.all_to_all_single(y, x, group=axis.group, async_op=True)
    return y, work


def shift_right(x: Tensor, axis: Axis) -> Tensor:
    """[...] -> [...]: what the rank to the left holds; zeros on the first rank."""
    return _shift(x, axis, 1)


def shift_left(x: Tensor, axis: Axis) -> Tensor:
    """[...] -> [...]: what the rank to the right holds; zeros on the last rank."""
    return _shift(x, axis, -1)


def _shift(x: Tensor, axis: Axis, step: int) -> Tensor:
    x, y = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    to, source = axis.rank + step, axis.rank - step
    operations = []
    if 0 <= to < axis.size:
        _sent("halo", x, 1)
        operations.append(dist.P2POp(dist.isend, x, group=axis.group, group_peer=to))
    if 0 <= source < axis.size:
        operations.append(dist.P2POp(dist.irecv, y, group=axis.group, group_peer=source))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return y


# Collectives with gradients


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """[...] -> [...]: identity; backward: all-reduce.

    Where something that every rank holds whole meets ranks that each see a part: an activation before a column-parallel
    product, or a weight, at its use, on ranks that see only some of the channels or tokens.
    """
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """[...] -> [...]: all-reduce; backward: identity. After a row-parallel product."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """[..., n, ...] -> [..., T n, ...]: all-gather; backward: reduce-scatter, because each rank's use of the whole
    contributes to the gradient."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis, dim)


def reduce_scatter_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """[..., T n, ...] -> [..., n, ...]: reduce-scatter; backward: all-gather."""
    return x if axis.size == 1 else _ReduceScatterTo.apply(x, axis, dim)


class Exchange:
    """One all-to-all in flight: `Exchange(x, axis)` starts it and `wait()` gives the result, so that work can be put
    between the two. The gradient is exchanged the same way: its all-to-all starts where `wait` was called and is
    waited for where the exchange was started.

        x [T, ...] -> [T, ...]: piece i goes to rank i, and the result's piece i comes from rank i
    """

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self._axis = axis
        self._works: dict[str, dist.Work] = {}
        self._buffer = x if axis.size == 1 else _ExchangeStart.apply(x, axis, self._works)

    def wait(self) -> Tensor:
        return self._buffer if self._axis.size == 1 else _ExchangeWait.apply(self._buffer, self._axis, self._works)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grad, ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(_ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _ExchangeStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, works: dict[str, dist.Work]) -> Tensor:
        ctx.works = works
        buffer, works["forward"] = start_all_to_all(x, axis)
        return buffer

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.works.pop("backward").wait()
        return grad, None, None


class _ExchangeWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer: Tensor, axis: Axis, works: dict[str, dist.Work]) -> Tensor:
        ctx.axis, ctx.works = axis, works
        works.pop("forward").wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        buffer, ctx.works["backward"] = start_all_to_all(grad, ctx.axis)
        return buffer, None, None
