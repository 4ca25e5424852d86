"""The long convolution of rows that an all-to-all between context ranks has delivered, y = gate (h (*) u + bias u).

Without a gate the rows may stay as they arrive: P slices of l tokens of every row, read and written where they stand,
without a copy that puts the tokens in order. With a gate the tokens are in order.
"""

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton.given import NO_GATE, Given, Rows
from hyena_dist.ops.triton.groups import Plan, channel_groups, convolution, rows_in_segments
from hyena_dist.ops.triton.operator import plans_on


def convolve(u: Tensor, h: Tensor, direct: Tensor, gate: Tensor | None = None, *, out: Tensor,
             segments: Segments | None) -> None:
    """Writes y to `out`.

    Args:
        u, out: [P, B, c, l] or, with tokens in order, [B, c, L]; of any strides but the last.
        h: [c, at least as many lags as the longest sequence has tokens].
        direct: [c], the convolution's bias.
        gate: [B, c, L]; None: the result is not multiplied.
        segments: of the whole rows of L = P l tokens.
    """
    _convolve(u, h.contiguous(), direct.contiguous(), gate, out, *_of(segments, u))


def convolve_backward(dy: Tensor, u: Tensor, h: Tensor, direct: Tensor, du: Tensor, gate: Tensor | None = None,
                      dgate: Tensor | None = None, *, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Writes the gradients at u and at the gate to du, of u's strides, and dgate, which must not share memory with u
    and the gate, and y over dy; returns those at h and direct."""
    return _convolve_backward(dy, u, h.contiguous(), direct.contiguous(), gate, du, dgate, *_of(segments, u))


def _of(segments: Segments | None, u: Tensor) -> tuple[Tensor | None, list[int]]:
    return (None, []) if segments is None else segments.by_size(u.device)


@torch.library.custom_op("hyena::convolve", mutates_args=("out",))
def _convolve(u: Tensor, h: Tensor, direct: Tensor, gate: Tensor | None, out: Tensor, places: Tensor | None,
              sizes: list[int]) -> None:
    with torch.cuda.device_of(u):
        for part in _groups(u, places, sizes):
            for rows, plan in _rows(u, places, sizes):
                convolution(_given(u, gate, part, rows), plan).forward(h[part], direct, out[..., part, :])


@torch.library.custom_op("hyena::convolve_backward", mutates_args=("dy", "du", "dgate"))
def _convolve_backward(dy: Tensor, u: Tensor, h: Tensor, direct: Tensor, gate: Tensor | None, du: Tensor,
                       dgate: Tensor | None, places: Tensor | None, sizes: list[int]) -> tuple[Tensor, Tensor]:
    dh, ddirect = torch.zeros_like(h), torch.zeros_like(direct)
    with torch.cuda.device_of(u):
        for part in _groups(u, places, sizes):
            for rows, plan in _rows(u, places, sizes):
                found, given = torch.empty_like(h[part]), _given(u, gate, part, rows)
                sums = convolution(given, plan).backward(
                    dy[..., part, :], h[part], direct, given.p if dgate is None else dgate[:, None, part],
                    du[..., part, :], found)
                dh[part, : rows.size].add_(found[:, : rows.size])
                ddirect[part].add_(sums.sum((0, 2), dtype=direct.dtype))
    return dh, ddirect


_convolve.register_fake(lambda *_: None)
_convolve_backward.register_fake(lambda _dy, _u, h, direct, *_: (torch.empty_like(h), torch.empty_like(direct)))


def _given(u: Tensor, gate: Tensor | None, part: slice, rows: Rows) -> Given:
    """The gate is the only block there is; without one the kernels read none."""
    blocks = (u[0] if u.dim() == 4 else u) if gate is None else gate
    return Given(blocks[:, None, part], u[..., part, :], None, None, u.shape[-2], part.start,
                 NO_GATE if gate is None else 0, rows)


def _rows(u: Tensor, places: Tensor | None, sizes: list[int]) -> list[tuple[Rows, Plan]]:
    plan_of = plans_on(u)
    if places is not None:
        return rows_in_segments(places, sizes, plan_of)
    batch, length = u.shape[-3], u.shape[-1] * (u.shape[0] if u.dim() == 4 else 1)
    return [(Rows(batch, length, batch * length), plan_of(length))]


def _groups(u: Tensor, places: Tensor | None, sizes: list[int]) -> list[slice]:
    return channel_groups(u.shape[-2], _rows(u, places, sizes))


def _cost(u: Tensor, gate: Tensor | None, out: Tensor, places: Tensor | None, sizes: list[int],
          backward: bool) -> Cost:
    steps = [convolution(_given(u, gate, part, rows), plan) for part in _groups(u, places, sizes)
             for rows, plan in _rows(u, places, sizes)]
    sums = Cost(0.0, 0.0, 3 * backward)
    return sum((step.cost(out, backward) + sums for step in steps), Cost(0.0, 0.0, 2 * backward))


declare_cost("hyena::convolve", lambda u, _h, _direct, gate, out, places, sizes: _cost(
    u, gate, out, places, sizes, False))
declare_cost("hyena::convolve_backward", lambda dy, u, _h, _direct, gate, _du, _dgate, places, sizes: _cost(
    u, gate, dy, places, sizes, True))
