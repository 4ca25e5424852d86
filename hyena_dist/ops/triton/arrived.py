"""The long convolution of rows as an all-to-all between context ranks delivers them, y = h (*) u + bias u: P slices of
l tokens of every row, read and written where they stand, without a copy that puts the tokens in order."""

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton.given import NO_GATE, Given, Rows
from hyena_dist.ops.triton.groups import Plan, channel_groups, convolution, rows_in_segments
from hyena_dist.ops.triton.operator import plans_on


def convolve(u: Tensor, h: Tensor, direct: Tensor, out: Tensor, segments: Segments | None) -> None:
    """Writes y to `out`.

    Args:
        u, out: [P, B, c, l], of any strides but the last.
        h: [c, at least as many lags as the longest sequence has tokens].
        direct: [c], the convolution's bias.
        segments: of the whole rows of P l tokens.
    """
    _convolve(u, h.contiguous(), direct.contiguous(), out, *_of(segments, u))


def convolve_backward(dy: Tensor, u: Tensor, h: Tensor, direct: Tensor, du: Tensor,
                      segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Writes the gradient at u to du, which must not share memory with u, and y over dy; returns those at h and
    direct."""
    return _convolve_backward(dy, u, h.contiguous(), direct.contiguous(), du, *_of(segments, u))


def _of(segments: Segments | None, u: Tensor) -> tuple[Tensor | None, list[int]]:
    return (None, []) if segments is None else segments.by_size(u.device)


@torch.library.custom_op("hyena::convolve", mutates_args=("out",))
def _convolve(u: Tensor, h: Tensor, direct: Tensor, out: Tensor, places: Tensor | None, sizes: list[int]) -> None:
    with torch.cuda.device_of(u):
        for part in _groups(u, places, sizes):
            for rows, plan in _rows(u, places, sizes):
                convolution(_given(u, part, rows), plan).forward(h[part], direct, out[:, :, part])


@torch.library.custom_op("hyena::convolve_backward", mutates_args=("dy", "du"))
def _convolve_backward(dy: Tensor, u: Tensor, h: Tensor, direct: Tensor, du: Tensor, places: Tensor | None,
                       sizes: list[int]) -> tuple[Tensor, Tensor]:
    dh, ddirect = torch.zeros_like(h), torch.zeros_like(direct)
    with torch.cuda.device_of(u):
        for part in _groups(u, places, sizes):
            for rows, plan in _rows(u, places, sizes):
                found = torch.empty_like(h[part])
                sums = convolution(_given(u, part, rows), plan).backward(
                    dy[:, :, part], h[part], direct, u[0, :, None, part], du[:, :, part], found)
                dh[part, : rows.size] += found[:, : rows.size]
                ddirect[part] += sums.sum((0, 2), dtype=direct.dtype)
    return dh, ddirect


_convolve.register_fake(lambda *_: None)
_convolve_backward.register_fake(lambda _dy, _u, h, direct, *_: (torch.empty_like(h), torch.empty_like(direct)))


def _given(u: Tensor, part: slice, rows: Rows) -> Given:
    return Given(u[0, :, None, part], u[:, :, part], None, None, u.shape[2], part.start, NO_GATE, rows)


def _rows(u: Tensor, places: Tensor | None, sizes: list[int]) -> list[tuple[Rows, Plan]]:
    plan_of = plans_on(u)
    if places is not None:
        return rows_in_segments(places, sizes, plan_of)
    slices, batch, _, length = u.shape
    return [(Rows(batch, slices * length, batch * slices * length), plan_of(slices * length))]


def _groups(u: Tensor, places: Tensor | None, sizes: list[int]) -> list[slice]:
    return channel_groups(u.shape[2], _rows(u, places, sizes))


def _cost(u: Tensor, out: Tensor, places: Tensor | None, sizes: list[int], backward: bool) -> Cost:
    steps = [convolution(_given(u, part, rows), plan) for part in _groups(u, places, sizes)
             for rows, plan in _rows(u, places, sizes)]
    return sum((step.cost(out, backward) + Cost(0.0, 0.0, 4 * backward) for step in steps), Cost())


declare_cost("hyena::convolve", lambda u, _h, _direct, out, places, sizes: _cost(u, out, places, sizes, False))
declare_cost("hyena::convolve_backward", lambda dy, u, _h, _direct, _du, places, sizes: _cost(
    u, dy, places, sizes, True))
