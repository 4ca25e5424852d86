"""`mix` of a slice of the tokens, where the convolutions cross context ranks (`ops.mix` says what `mix` is).

The short convolution takes the K - 1 tokens on the left of the slice, a halo, from the rank on the left. What the long
convolutions read, u and the gates between two of them, goes through an `Exchange`, which gives the last convolution of
this slice; everything else is local, in chunks of channels. Segments are those of the whole sequence: the same on every
rank, wherever their borders lie.

What the buffers hold in the backward pass, one thing after the other:

    buffer    before            during                                              after
    p         projection        blocks become their gradients, x0's first           its gradient
    dy        gradient at u     chunk by chunk u takes its place                    u
    conv      last convolution  chunk by chunk its gradient takes its place         its gradient

Legend: l tokens of the slice, B batch, C channels, K taps, N order.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hyena_dist.ops.chunking import chunks
from hyena_dist.ops.mix import Asked, MixWeights
from hyena_dist.ops.precision import compute_dtype
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.short_conv import ShortConvTape
from hyena_dist.ops.workspace import Workspace

REST = slice(1, None)
"""The blocks x1, ..., v."""


class Exchange(Protocol):
    """What crosses the context ranks, outside autograd. Every method is collective."""

    @property
    def rank(self) -> int:
        """Which slice of the tokens this rank has."""

    @property
    def ranks(self) -> int:
        """How many slices there are."""

    @property
    def knows_segments(self) -> bool:
        """Whether it convolves segments apart."""

    def from_left(self, x: Tensor) -> Tensor:
        """x of the rank on the left, of the same shape; zeros on the first rank."""

    def from_right(self, x: Tensor) -> Tensor:
        """The same of the rank on the right; zeros on the last rank."""

    def convolve(self, inputs: Tensor, filters: Tensor, bias: Tensor,
                 segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
        """inputs [N - 1, B, C, l]: u and the gates between two convolutions, in the order of their use -> the last
        convolution [B, C, l], which is the caller's to write over, and what the gradients need. The filters have the
        channels and lags that this rank needs of them, bias is [N - 1, C]."""

    def convolve_backward(self, dconv: Tensor, filters: Tensor, bias: Tensor,
                          kept: list[Tensor], segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients at inputs, filters and bias from that at the last convolution; this rank's part of them."""


class Across:
    """The backend (`ops.mix.Backend`) of a slice.

    Args:
        kernels: `ops.triton.across`, where it is to compute what is local.
    """

    keeps_spectra = False

    def __init__(self, exchange: Exchange, kernels: ModuleType | None = None) -> None:
        self._exchange, self._kernels = exchange, kernels

    def refusal(self, asked: Asked) -> str | None:
        if asked.segmented and not self._exchange.knows_segments:
            return ("the transform that is spread over context ranks does not know segments: take "
                    "parallel.context_method=all_to_all, or parallel.context=1")
        if asked.length < asked.taps - 1:
            return (f"a context rank has {asked.length} tokens, and the short convolution reaches {asked.taps - 1} "
                    "back, into one neighbour only: use fewer context ranks or longer sequences")
        return None

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
        blocks, reach = _blocks(p, weights), _reach(weights)
        if self._kernels:
            halo = self._halo(blocks, reach)
            given = self._given(blocks, halo, weights, segments)
            conv, kept = self._exchange.convolve(self._kernels.enter(*given), weights.filters, weights.bias, segments)
            return self._kernels.leave(*given, conv), [halo, conv, *kept]
        work = Workspace(compute_dtype(p, weights.bias), p.device)
        short = _short_conv(p, weights, work, self._positions(segments, p))
        halo = self._halo(blocks, reach)
        conv, kept = self._exchange.convolve(_gated_inputs(blocks, halo, short, work), weights.filters, weights.bias,
                                             segments)
        return _gated(blocks, halo, conv, short), [halo, conv, *kept]

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                     kept: list[Tensor]) -> MixWeights:
        if self._kernels:
            return self._backward_by_kernels(_blocks(p, weights), dy, weights, segments, kept)
        blocks, work = _blocks(p, weights), Workspace(compute_dtype(p, weights.bias), p.device)
        short = _short_conv(p, weights, work, self._positions(segments, p))
        halo, conv, *kept = kept
        dhalo = torch.empty_like(halo)
        _gated_backward(blocks, halo, conv, dy, dhalo, short)
        work.clear()  # the exchange comes next
        dinputs, dfilters, dbias = self._exchange.convolve_backward(conv, weights.filters, weights.bias, kept,
                                                                     segments)
        _gated_inputs_backward(blocks, halo, dinputs, dhalo, short, work)
        self._add_from_right(blocks, dhalo)
        return MixWeights(short.dweight.flatten(0, 1), short.dbias.flatten(), dfilters, dbias)

    def _backward_by_kernels(self, blocks: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                             kept: list[Tensor]) -> MixWeights:
        assert self._kernels is not None
        assert weights.short_weight is not None
        assert weights.short_bias is not None
        halo, conv, *kept = kept
        given, conv = self._given(blocks, halo, weights, segments), conv.contiguous()
        dhalo_gate, dgate = self._kernels.leave_backward(*given, conv, dy)
        dinputs, dfilters, dbias = self._exchange.convolve_backward(conv, weights.filters, weights.bias, kept, segments)
        dhalo_rest, drest = self._kernels.enter_backward(*given, dinputs)
        self._add_from_right(blocks, torch.cat([dhalo_gate, dhalo_rest], dim=1))
        dweight, dshort_bias = torch.cat([dgate, drest]).flatten(0, 1).split([_reach(weights) + 1, 1], dim=1)
        return MixWeights(dweight.to(weights.short_weight.dtype), dshort_bias[:, 0].to(weights.short_bias.dtype),
                          dfilters, dbias)

    def _halo(self, blocks: Tensor, reach: int) -> Tensor:
        """The last tokens of the rank on the left, [B, N + 1, C, K - 1]."""
        tail = blocks[..., blocks.shape[-1] - reach :].contiguous()
        return self._exchange.from_left(tail) if reach else tail

    def _add_from_right(self, blocks: Tensor, dhalo: Tensor) -> None:
        """Add the gradients at the last tokens, which the rank on the right has used too."""
        reach = dhalo.shape[-1]
        if reach:
            blocks[..., blocks.shape[-1] - reach :] += self._exchange.from_right(dhalo)

    def _given(self, blocks: Tensor, halo: Tensor, weights: MixWeights,
               segments: Segments | None) -> tuple[Tensor | None, ...]:
        """What the kernels read first."""
        positions = self._positions(segments, blocks)
        return (blocks, halo, weights.short_weight, weights.short_bias,
                None if positions is None else positions.int().contiguous())

    def _positions(self, segments: Segments | None, p: Tensor) -> Tensor | None:
        """[B, l]: the place in its segment of every token of the slice."""
        if segments is None:
            return None
        return segments.positions(p.device).chunk(self._exchange.ranks, dim=1)[self._exchange.rank]


def _blocks(p: Tensor, weights: MixWeights) -> Tensor:
    """[B, (N + 1) C, l] -> [B, N + 1, C, l]"""
    return p.unflatten(1, (len(weights.filters) + 2, -1))


def _reach(weights: MixWeights) -> int:
    assert weights.short_weight is not None
    return weights.short_weight.shape[1] - 1


def _short_conv(p: Tensor, weights: MixWeights, work: Workspace, positions: Tensor | None) -> ShortConvTape:
    """Of blocks of channels; one for the whole of a pass, because it collects the gradients."""
    assert weights.short_weight is not None
    assert weights.short_bias is not None
    blocks = len(weights.filters) + 2, weights.bias.shape[1]
    return ShortConvTape(weights.short_weight.unflatten(0, blocks), weights.short_bias.unflatten(0, blocks),
                         compute_dtype(p, weights.short_weight), work, positions)


def _gated_inputs(blocks: Tensor, halo: Tensor, short: ShortConvTape, work: Workspace) -> Tensor:
    """What the long convolutions read: [N - 1, B, C, l], first u = x_{N-1} * v, then the gates between two
    convolutions in the order of their use, x_{N-2}, ..., x_1."""
    batch, count, channels, length = blocks.shape
    packed = torch.empty(count - 2, batch, channels, length, dtype=blocks.dtype, device=blocks.device)
    for part in chunks(channels, batch * length, blocks.device):
        x, left = (t[:, REST, part].to(short.dtype) for t in (blocks, halo))
        *gates, v = short.forward(x, (REST, part), left).unbind(1)
        packed[0, :, part] = v.mul_(gates.pop())
        for place, gate in enumerate(reversed(gates), start=1):
            packed[place, :, part] = gate
    work.clear()  # the exchange comes next
    return packed


def _gated_inputs_backward(blocks: Tensor, halo: Tensor, dinputs: Tensor, dhalo: Tensor, short: ShortConvTape,
                           work: Workspace) -> None:
    """Writes the gradients at the blocks over them, and those at the halo to dhalo."""
    batch, _, channels, length = blocks.shape
    last_two = slice(-2, None)
    for part in chunks(channels, batch * length, blocks.device):
        x, left = (t[:, REST, part].to(short.dtype) for t in (blocks, halo))
        dshort = work("dshort", *x.shape)
        du, *inner = (d[:, part].to(short.dtype) for d in dinputs)
        gate, v = short.forward(x[:, last_two], (last_two, part), left[:, last_two]).unbind(1)
        for place, grad in enumerate(reversed(inner)):
            dshort[:, place] = grad
        torch.mul(v, du, out=dshort[:, -2])
        torch.mul(gate, du, out=dshort[:, -1])
        dhalo[:, REST, part] = short.backward(dshort, x, (REST, part), blocks[:, REST, part], left)


def _gated(blocks: Tensor, halo: Tensor, conv: Tensor, short: ShortConvTape) -> Tensor:
    """x0 * conv: [B, C, l]."""
    batch, _, channels, length = blocks.shape
    y = torch.empty(batch, channels, length, dtype=blocks.dtype, device=blocks.device)
    for part in chunks(channels, batch * length, blocks.device):
        gate = short.forward(blocks[:, 0, part].to(short.dtype), (0, part), halo[:, 0, part].to(short.dtype))
        y[:, part] = gate.mul_(conv[:, part])
    return y


def _gated_backward(blocks: Tensor, halo: Tensor, conv: Tensor, dy: Tensor, dhalo: Tensor,
                    short: ShortConvTape) -> None:
    """Writes the gradient at x0's block over it, that at conv over it, that at the halo to dhalo, and x0 * conv over
    dy."""
    batch, _, channels, length = blocks.shape
    for part in chunks(channels, batch * length, blocks.device):
        x, left = blocks[:, 0, part].to(short.dtype), halo[:, 0, part].to(short.dtype)
        grad, c = dy[:, part].to(short.dtype), conv[:, part].to(short.dtype)
        gate = short.forward(x, (0, part), left)
        dconv, dgate = gate * grad, grad * c
        dy[:, part] = gate.mul_(c)
        conv[:, part] = dconv
        dhalo[:, 0, part] = short.backward(dgate, x, (0, part), blocks[:, 0, part], left)
