"""How the Hyena operator crosses context ranks (`ops.across.Exchange`), and which part of the filters a rank generates.

Legend: B batch, C this tensor rank's channels, P context ranks, l tokens of a slice, L = P l, N order. Only u and its
convolution cross ranks, in their own dtype; for N > 2 the inner gates go along once, and the result stays in channels
until the last convolution.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hyena_dist.config.context import choose_method, exchanged_rows
from hyena_dist.config.schema import Config
from hyena_dist.ops import long_conv
from hyena_dist.ops.backends import slice_kernels
from hyena_dist.ops.segments import Segments
from hyena_dist.parallel import distributed_fft
from hyena_dist.parallel.collectives import Exchange, shift_left, shift_right
from hyena_dist.parallel.groups import Axis, Groups

logger = logging.getLogger(__name__)


class Filter(Protocol):
    """The filters of a mixer: [N - 1, C, n] at ranges of lags, for some channels, one range after the other, or all."""

    def __call__(self, lags: list[slice], channels: Sequence[slice] | None = None) -> Tensor: ...


def log_context_method(config: Config, groups: Groups) -> None:
    """Say what `parallel.context_method=auto` took."""
    if groups.context.size > 1:
        rows = exchanged_rows(channels=config.model.hidden_size // groups.tensor.size,
                              batch=config.train.micro_batch_size, groups=config.parallel.overlap_groups)
        method = choose_method(config.parallel.context_method, rows=rows, ranks=groups.context.size)
        logger.info("parallel.context_method=%s: %s", config.parallel.context_method, method)


class _Neighbours:
    """The halo of the short convolution."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.rank, self.ranks = axis, axis.rank, axis.size

    def from_left(self, x: Tensor) -> Tensor:
        return shift_right(x, self.axis)

    def from_right(self, x: Tensor) -> Tensor:
        return shift_left(x, self.axis)


class _Rows(NamedTuple):
    """Some of the rows that a rank has of an overlap group: the same number of every one of these channels."""

    rows: slice
    """Of the rank's rows of the group."""
    windows: slice
    """The windows whose channels they are."""
    own: slice
    """The channels among those of which the rank generates filters."""
    channels: slice
    """The channels among all."""

    def of(self, x: Tensor) -> Tensor:
        """[R, L] of the group -> [B', c, L], the same memory."""
        return x[self.rows].unflatten(0, (self.own.stop - self.own.start, -1)).transpose(0, 1)

    def arrived(self, x: Tensor) -> Tensor:
        """[P, 1, R, l] -> [P, B', c, l], the same memory."""
        return x[:, 0, self.rows].unflatten(1, (self.own.stop - self.own.start, -1)).transpose(1, 2)


class AllToAll(_Neighbours):
    """Tokens are exchanged for channels and back, in groups of channels, so that a group's exchange runs while the
    group before it is transformed. Each rank generates its own channels of the filters only.

    A row is a channel of one window. They are numbered channel by channel, so that a rank's are of few channels; where
    the ranks do not divide the channels, two ranks share one.

    Args:
        backend: of `ops`. Of order 2 kernels convolve the rows where they arrived; of higher orders, where a gate
            multiplies what one convolution gives to the next, rows with their tokens in order, as torch does.
    """

    knows_segments = True  # a rank has rows of whole sequences, in which it convolves them apart

    def __init__(self, axis: Axis, *, batch: int, channels: int, groups: int, backend: str = "auto") -> None:
        super().__init__(axis)
        self._batch, self._backend = batch, backend
        size = -(-channels // groups)
        self._groups = [slice(start, min(start + size, channels)) for start in range(0, channels, size)]
        self.channels: list[slice] = []
        """The channels of which this rank has rows, one range for each group."""
        self._rows: list[list[_Rows]] = []
        generated = 0
        for group in self._groups:
            owned = _owned_rows((group.stop - group.start) * batch, axis)
            first, stop = owned.start // batch, (owned.stop - 1) // batch + 1
            self.channels.append(slice(group.start + first, group.start + stop))
            self._rows.append(_by_channels(owned, batch, own=generated - first, channels=group.start))
            generated += stop - first

    def filters(self, mixer_filter: Filter, length: int, segments: Segments | None = None) -> Tensor:
        """[N - 1, this rank's channels, as many lags as the longest sequence has tokens], by one call of the filter; l
        is `length`."""
        return mixer_filter([slice(0, segments.longest if segments else self.axis.size * length)], self.channels)

    def convolve(self, inputs: Tensor, filters: Tensor, bias: Tensor,
                 segments: Segments | None = None) -> tuple[Tensor, list[Tensor]]:
        """Keeps of every group the rows of u and of the inner gates [N - 1, R, L], and the inputs [R, L] of the second
        convolution and those after it; by kernels of order 2 the rows as they arrived, [P, 1, R, l]."""
        kernels = self._kernels(inputs, filters)
        convolve = (kernels or long_conv).convolve
        started = [self._send_rows(inputs[:, :, group]) for group in self._groups]
        returning: list[Exchange] = []
        kept: list[Tensor] = []
        for blocks in self._rows:
            if kernels and len(filters) == 1:
                arrived = started.pop(0).wait()
                kept.append(arrived)
                result = torch.empty_like(arrived)
                for block in blocks:
                    convolve(block.arrived(arrived), filters[0, block.own], bias[0, block.channels],
                             out=block.arrived(result), segments=segments and segments.part(block.windows))
                returning.append(Exchange(result, self.axis))
                continue
            received = _tokens_in_order(started.pop(0).wait())  # whose buffer is free now
            u, *gates = received
            kept.append(received)
            for o, h in enumerate(filters):
                y = torch.empty_like(u)
                for block in blocks:
                    gate = block.of(gates[o]) if o < len(gates) else None
                    convolve(block.of(u), h[block.own], bias[o, block.channels], gate, out=block.of(y),
                             segments=segments and segments.part(block.windows))
                kept += [y] if o < len(gates) else []
                u = y
            returning.append(self._send_tokens(u[None]))
        return self._receive_channels(returning)[0], kept

    def convolve_backward(self, dconv: Tensor, filters: Tensor, bias: Tensor, kept: list[Tensor],
                          segments: Segments | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """By torch gradients are written over what was kept."""
        kernels = self._kernels(dconv[None], filters)
        started = [self._send_rows(dconv[None, :, group]) for group in self._groups]
        returning: list[Exchange] = []
        dfilters, dbias = torch.empty_like(filters), torch.zeros_like(bias)
        for number, blocks in enumerate(self._rows):
            if kernels and len(filters) == 1:
                gradient = started.pop(0).wait()
                du = torch.empty_like(gradient)
                for block in blocks:
                    dfilters[0, block.own], dbias[0, block.channels] = kernels.convolve_backward(
                        block.arrived(gradient), block.arrived(kept[number]), filters[0, block.own],
                        bias[0, block.channels], block.arrived(du),
                        segments=segments and segments.part(block.windows))
                returning.append(Exchange(du, self.axis))
                continue
            received, *later = kept[number * len(filters) : (number + 1) * len(filters)]
            gradients = torch.empty_like(received) if kernels else received
            (dy,), gates = _tokens_in_order(started.pop(0).wait()), received[1:]
            for o, u in reversed(list(enumerate([received[0], *later]))):
                du = gradients[0] if o == 0 else torch.empty_like(u) if kernels else u
                for block in blocks:
                    gate, dgate = ((block.of(gates[o]), block.of(gradients[o + 1])) if o < len(gates) else (None, None))
                    dfilters[o, block.own], dbias[o, block.channels] = _gradients(
                        kernels, block.of(dy), block.of(u), filters[o, block.own], bias[o, block.channels],
                        block.of(du), gate, dgate, segments and segments.part(block.windows))
                dy = du
            returning.append(self._send_tokens(gradients))
        return self._receive_channels(returning), dfilters, dbias

    def _kernels(self, inputs: Tensor, filters: Tensor) -> ModuleType | None:
        """Those that convolve the rows; None: torch does."""
        dtype = torch.float64 if filters.dtype == torch.float64 else inputs.dtype
        return slice_kernels(self._backend, inputs.device, dtype)

    def _send_rows(self, x: Tensor) -> Exchange:
        """[S, B, c, l] -> [P, S, R, l], to the ranks that own the R = c B / P rows."""
        return Exchange(x.transpose(1, 2).flatten(1, 2).unflatten(1, (self.axis.size, -1)).movedim(1, 0), self.axis)

    def _send_tokens(self, x: Tensor) -> Exchange:
        """[S, R, L] -> [P, S, R, l], to the ranks that own the tokens."""
        return Exchange(x.unflatten(2, (self.axis.size, -1)).movedim(2, 0), self.axis)

    def _receive_channels(self, returning: list[Exchange]) -> Tensor:
        """[P, S, R, l] of every group -> [S, B, C, l]."""
        back = [exchange.wait().movedim(0, 1).flatten(1, 2).unflatten(1, (-1, self._batch)).transpose(1, 2)
                for exchange in returning]
        return torch.cat(back, dim=2) if len(back) > 1 else back[0]


class DistributedFft(_Neighbours):
    """Tokens stay and the transform is spread over the ranks; each generates all channels of the filters, at the lags
    that it needs."""

    knows_segments = False

    def filters(self, mixer_filter: Filter, length: int, _segments: Segments | None = None) -> Tensor:
        """[N - 1, C, P, l / P]; l is `length`."""
        lags = distributed_fft.strided_lags(length * self.axis.size, self.axis.rank, self.axis.size)
        return mixer_filter(lags).unflatten(-1, (self.axis.size, -1))

    def convolve(self, inputs: Tensor, filters: Tensor, bias: Tensor,
                 _segments: Segments | None = None) -> tuple[Tensor, list[Tensor]]:
        """Keeps the inputs and every convolution but the last."""
        u, *gates = inputs
        kept = [inputs]
        for o, (h, b) in enumerate(zip(filters, bias, strict=True)):
            conv = distributed_fft.convolve(u, h, b, self.axis)
            if o < len(gates):
                kept.append(conv)
                u = gates[o] * conv
        return conv, kept

    def convolve_backward(self, dconv: Tensor, filters: Tensor, bias: Tensor, kept: list[Tensor],
                          _segments: Segments | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Writes gradients over the inputs."""
        inputs, *convs = kept
        dfilters, dbias = torch.empty_like(filters), torch.empty_like(bias)
        for o in reversed(range(len(filters))):
            u = inputs[o] * convs[o - 1] if o else inputs[0]
            distributed_fft.convolve_backward(dconv, u, filters[o], bias[o], self.axis, out=(u, dfilters[o], dbias[o]))
            if o:  # u holds its gradient now
                dconv = u * inputs[o]
                torch.mul(u, convs[o - 1], out=inputs[o])
        return inputs, dfilters, dbias


def _owned_rows(rows: int, axis: Axis) -> range:
    share = rows // axis.size
    return range(axis.rank * share, (axis.rank + 1) * share)


def _by_channels(owned: range, batch: int, *, own: int, channels: int) -> list[_Rows]:
    """Cut a rank's rows of an overlap group into a part of a channel, whole channels, and a part of a channel.

    Args:
        own, channels: place of the group's channel 0 among those of the rank, and among all.
    """
    whole = range(-(-owned.start // batch) * batch, owned.stop // batch * batch)
    inner = [whole.start, whole.stop] if whole else [edge for edge in (whole.start,) if edge < owned.stop]
    edges = [owned.start, *inner, owned.stop]
    return [_Rows(slice(start - owned.start, stop - owned.start),
                  slice(0, batch) if start % batch == 0 and stop % batch == 0 else
                  slice(start % batch, (stop - 1) % batch + 1),
                  *(slice(base + start // batch, base + (stop - 1) // batch + 1) for base in (own, channels)))
        for start, stop in pairwise(edges) if start < stop]


def _gradients(kernels: ModuleType | None, dy: Tensor, u: Tensor, h: Tensor, bias: Tensor, du: Tensor,
               gate: Tensor | None, dgate: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Of a convolution of rows with their tokens in order, [B', c, L]: those at u and at the gate go to du and dgate,
    which by torch are u and the gate themselves; returns those at h and bias."""
    if kernels:
        return kernels.convolve_backward(dy, u, h, bias, du, gate, dgate, segments=segments)
    _, dh, dbias, _ = long_conv.convolve_backward(dy, u, h, bias, gate, over=True, segments=segments)
    return dh, dbias


def _tokens_in_order(x: Tensor) -> Tensor:
    """[P, S, R, l] -> [S, R, P l], of one token after the other: of slices of one token flattening makes a view that
    is not."""
    return x.movedim(0, 2).flatten(2, 3).contiguous()
