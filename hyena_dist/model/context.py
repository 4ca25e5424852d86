"""The long convolutions of a mixer over context ranks: what crosses them, and who generates which part of the filter.

Legend: B batch, C this tensor rank's channels, P context ranks, l tokens of a slice, L = P l, N order. Only u and its
convolution cross ranks, in their own dtype; for N > 2 the inner gates go along once, and the result stays in channels
until the last convolution.
"""

import logging
from typing import Protocol

import torch
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.ops.long_conv import causal_conv
from hyena_dist.parallel.collectives import Exchange
from hyena_dist.parallel.distributed_fft import distributed_causal_conv, strided_lags
from hyena_dist.parallel.groups import Axis, Groups

logger = logging.getLogger(__name__)


class Filter(Protocol):
    """The filters of a mixer: [N - 1, C, n] at ranges of lags, for some channels or all."""

    def __call__(self, lags: list[slice], channels: slice | None = None) -> Tensor: ...


def choose_method(method: str, *, rows: int, context: int) -> str:
    """Resolve `auto`: all_to_all while the context ranks divide the rows (channels of a tensor rank x batch) that it
    deals out, else distributed_fft, which sends several times the bytes and has no such limit."""
    if method != "auto":
        return method
    return "all_to_all" if rows % context == 0 else "distributed_fft"


def log_context_method(config: Config, groups: Groups) -> None:
    """Say what `parallel.context_method=auto` took."""
    if groups.context.size > 1:
        rows = config.train.micro_batch_size * config.model.hidden_size // groups.tensor.size
        method = choose_method(config.parallel.context_method, rows=rows // config.parallel.overlap_groups,
                               context=groups.context.size)
        logger.info("parallel.context_method=%s: %s", config.parallel.context_method, method)


def all_to_all_convs(inputs: Tensor, mixer_filter: Filter, bias: Tensor, axis: Axis, groups: int) -> Tensor:
    """inputs [N - 1, B, C, l], u and the gates between two convolutions -> the last convolution, [B, C, l]. bias
    [N - 1, C].

    Tokens are exchanged for channels and back, in groups of channels, so that a group's exchange runs while the group
    before it is transformed. Each rank generates its own rows of the filters only."""
    _, batch, _, length = inputs.shape
    pieces = inputs.chunk(groups, dim=2)
    started = [Exchange(_rows_to_ranks(piece, axis.size), axis) for piece in pieces]
    returning: list[Exchange] = []
    first_channel = 0
    for piece, exchange in zip(pieces, started, strict=True):
        owned = _owned_rows(piece.shape[2] * batch, axis)
        channels = slice(owned.start // batch, (owned.stop - 1) // batch + 1)  # of this piece: theirs are the rows
        of_all = slice(first_channel + channels.start, first_channel + channels.stop)
        filters = mixer_filter([slice(0, axis.size * length)], of_all)
        rows, *inner_rows = _tokens_in_order(exchange.wait())
        row = None
        if len(owned) < batch * (channels.stop - channels.start):
            row = torch.arange(owned.start, owned.stop, device=inputs.device) // batch - channels.start
        for o, h in enumerate(filters):
            gate = inner_rows[o] if o < len(inner_rows) else None
            rows = _conv_rows(rows, h, bias[o][of_all], gate, batch, row)
        first_channel += piece.shape[2]
        returning.append(Exchange(rows.unflatten(1, (axis.size, length)).movedim(1, 0), axis))
    back = [_channels_in_order(exchange.wait(), batch) for exchange in returning]
    return torch.cat(back, dim=1) if len(back) > 1 else back[0]


def distributed_fft_convs(inputs: Tensor, mixer_filter: Filter, bias: Tensor, axis: Axis) -> Tensor:
    """The same, but tokens stay and the transform is spread over the ranks; each generates all rows of the filters at
    the lags that it needs."""
    length = inputs.shape[-1]
    lags = strided_lags(length * axis.size, axis.rank, axis.size)
    filters = mixer_filter(lags).unflatten(-1, (axis.size, length // axis.size))
    u, *gates = inputs
    for o, (h, b) in enumerate(zip(filters, bias, strict=True)):
        u = distributed_causal_conv(u, h, b, axis)
        u = gates[o] * u if o < len(gates) else u
    return u


def _owned_rows(rows: int, axis: Axis) -> range:
    share = rows // axis.size
    return range(axis.rank * share, (axis.rank + 1) * share)


def _rows_to_ranks(x: Tensor, ranks: int) -> Tensor:
    """[S, B, C, l] -> [P, S, C B / P, l]: rows are numbered channel by channel, so a rank's are of few channels."""
    return x.transpose(1, 2).flatten(1, 2).unflatten(1, (ranks, -1)).movedim(1, 0)


def _tokens_in_order(x: Tensor) -> Tensor:
    """[P, S, R, l] -> [S, R, P l]."""
    return x.movedim(0, 2).flatten(2, 3)


def _channels_in_order(x: Tensor, batch: int) -> Tensor:
    """[P, R, l] -> [B, C, l]."""
    return x.flatten(0, 1).unflatten(0, (-1, batch)).transpose(0, 1)


def _conv_rows(rows: Tensor, h: Tensor, bias: Tensor, gate: Tensor | None, batch: int,
               row: Tensor | None) -> Tensor:
    """[R, L] -> [R, L], row i by filter row[i]; None: each channel has its whole batch, whose rows share a filter."""
    if row is not None:
        return causal_conv(rows[None], h[row], bias[row], None if gate is None else gate[None])[0]
    u = rows.unflatten(0, (-1, batch)).transpose(0, 1)
    gates = None if gate is None else gate.unflatten(0, (-1, batch)).transpose(0, 1)
    return causal_conv(u, h, bias, gates).transpose(0, 1).flatten(0, 1)
