"""The causal convolution of a sequence that is cut over ranks, by one four-step transform spread over them.

P is the size of the axis, l the tokens of a rank, L = P l the length of the whole sequence, m = l / P. A position is
n = n1 l + n0 with n1 < P and n0 < l. Two layouts of a real tensor take turns:

    slice    [..., l]     rank n1 holds one n1 and every n0: the layout of activations
    strided  [P, ..., m]  rank r holds every n1 and n0 in [r m, (r + 1) m): the layout of a filter and of its gradient

Every rank must call with the same shapes: the channel chunks, and with them the exchanges, follow from these.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.parallel.collectives import Exchange
from hyena_dist.parallel.groups import Axis

EXCHANGED_ELEMENTS = 2**18
"""Elements on one rank of the rows that are transformed together on a CPU, which bounds the workspace."""

GPU_EXCHANGE_FACTOR = 64
"""How many times as many elsewhere, where messages and calls cost more."""

_Item = TypeVar("_Item")


def length_multiple(axis_size: int) -> int:
    """P^2: a sequence cut over P ranks, each slice cut in P again, must have a multiple of this many tokens."""
    return axis_size**2


def strided_lags(length: int, axis_rank: int, axis_size: int) -> list[slice]:
    """The lags of the filter that a rank must generate: n1 l + [r m, (r + 1) m) for each n1, `length` being L.

    Raises:
        ValueError: L is not a multiple of `length_multiple`.
    """
    _check_length(length, axis_size)
    tokens = length // axis_size
    piece = tokens // axis_size
    starts = (n1 * tokens + axis_rank * piece for n1 in range(axis_size))
    return [slice(start, start + piece) for start in starts]


def distributed_causal_conv(u: Tensor, h: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """Causal convolution of every channel of the whole sequence with its own filter, plus a direct term.

        y[b, c, t] = sum_{s <= t} h[c, t - s] u[b, c, s] + bias[c] u[b, c, t],    t and s over all L tokens

    u [B, C, l] is this rank's slice of the tokens and h [C, P, m] the filter at this rank's `strided_lags`; bias [C];
    y [B, C, l] is this rank's slice, in u's dtype. u and y travel in that dtype, half precision too; computed in
    float32, or in float64 if u or h is. Each rank gets the gradient of its own u and h, and of bias the part that
    comes from its own tokens: that one the caller sums over the axis.

    Raises:
        ValueError: shapes that do not fit.
    """
    channels, tokens = u.shape[1:]
    _check_length(tokens * axis.size, axis.size)
    expected = (channels, axis.size, tokens // axis.size)
    if h.shape != expected or bias.shape != (channels,):
        raise ValueError(f"u {tuple(u.shape)} over {axis.size} ranks needs h {list(expected)} and bias [{channels}], "
                         f"got {tuple(h.shape)} and {tuple(bias.shape)}")
    return _DistributedConv.apply(u, h, bias, axis)


def _check_length(length: int, axis_size: int) -> None:
    multiple = length_multiple(axis_size)
    if length % multiple:
        raise ValueError(f"a length of {length} over {axis_size} ranks must be a multiple of {multiple}")


class _DistributedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, h: Tensor, bias: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(u, h, bias)
        ctx.axis = axis
        return convolve(u, h, bias, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, h, bias = ctx.saved_tensors
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        dh, dbias = torch.empty_like(h), torch.empty_like(bias)
        convolve_backward(dy, u, h, bias, ctx.axis, out=(du, dh, dbias))
        return du, dh, dbias, None


# The right-angle convolution, y = Re( t^-n IFFT( FFT(t^n u) FFT(t^n h) ) ) with t = exp(i pi / 2L), whose transforms
# are spread over the ranks. Gradients are the same pipeline with conjugate spectra:
#
#     du = Re( t^-n IFFT( conj(H) G ) )    dh = Re( t^-n IFFT( sum_b conj(U_b) G_b ) )    G = FFT(t^n dy)
#
# The rows of u, dy and h go through a transform together, so that a chunk costs four exchanges each way: real, complex,
# complex, real. The real ones overlap with the work on the neighbouring chunks.


def convolve(u: Tensor, h: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """`distributed_causal_conv`, outside autograd and unchecked."""
    batch, channels, tokens = u.shape
    transform = _FourStep(tokens, _compute_dtype(u, h), u.device, axis)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)

    def conv(part: slice, incoming: Exchange) -> Exchange:
        rows = torch.cat([incoming.wait(), _filter_rows(h[part], bias[part], axis)], 1)
        spectra = transform.forward(rows)
        product = spectra[:batch].mul_(spectra[batch:])
        return Exchange(transform.inverse(product).to(u.dtype), axis)

    parts = _channel_parts(channels, (batch + 1) * tokens, u.device.type)
    with torch.autocast(u.device.type, enabled=False):
        incoming = _one_behind((part, Exchange(_to_strided(u[:, part], axis), axis)) for part in parts)
        outgoing = _one_behind((part, conv(part, exchange)) for part, exchange in incoming)
        for part, exchange in outgoing:
            y[:, part] = _to_slice(exchange.wait())
    return y


def convolve_backward(dy: Tensor, u: Tensor, h: Tensor, bias: Tensor, axis: Axis, *,
                      out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write the gradients of `convolve` at u, h and bias, from that at its result, into `out`. The first of them may be
    u itself: a chunk of it is written after it was read."""
    dtype = _compute_dtype(u, h)
    batch, channels, tokens = u.shape
    transform = _FourStep(tokens, dtype, u.device, axis)
    du, dh, dbias = out

    def start(part: slice) -> Exchange:
        dbias[part] = (u[:, part].to(dtype) * dy[:, part]).sum((0, 2))
        return Exchange(_to_strided(torch.cat([u[:, part], dy[:, part]]), axis), axis)

    def correlate(part: slice, incoming: Exchange) -> Exchange:
        rows = torch.cat([incoming.wait(), _filter_rows(h[part], bias[part], axis)], 1)
        spectra = transform.forward(rows)
        of_u, of_dy, of_h = spectra[:batch], spectra[batch:-1], spectra[-1:]
        product = torch.empty_like(spectra[: batch + 1])
        torch.mul(of_dy, of_h.conj_physical_(), out=product[:batch])
        torch.sum(of_u.conj_physical_().mul_(of_dy), 0, out=product[batch])
        gradient = transform.inverse(product)
        dh[part] = gradient[:, batch].movedim(0, 1)
        return Exchange(gradient[:, :batch].to(u.dtype), axis)

    parts = _channel_parts(channels, (2 * batch + 1) * tokens, u.device.type)
    with torch.autocast(u.device.type, enabled=False):
        incoming = _one_behind((part, start(part)) for part in parts)
        outgoing = _one_behind((part, correlate(part, exchange)) for part, exchange in incoming)
        for part, exchange in outgoing:
            du[:, part] = _to_slice(exchange.wait())


class _FourStep:
    """The transform FFT_L(t^n x) of rows spread over an axis, and the real part of its inverse.

        X[k1 + P k0] = sum_n0 w_l^(n0 k0) t^n0 w_L^(n0 k1) sum_n1 w_P^(n1 k1) t^(n1 l) x[n1 l + n0]

    with w_N = exp(-2i pi / N). [P, R, c, m] real, strided -> [R, c, l] complex: rank k1 has the frequencies k1 + P k0.
    One complex exchange each way, between the sums over n1 and n0.
    """

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device, axis: Axis) -> None:
        self.axis = axis
        self.twist, self.twiddle = _factors(tokens, axis.rank, axis.size, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(x * self.twist, dim=0).mul_(self.twiddle)
        return torch.fft.fft(_to_slice(self._exchange(x)))

    def inverse(self, spectrum: Tensor) -> Tensor:
        x = self._exchange(_to_strided(torch.fft.ifft(spectrum), self.axis))
        x = torch.fft.ifft(x * self.twiddle.conj(), dim=0)
        # Re(conj(twist) x) in two real multiply-adds: no complex product whose imaginary half is thrown away.
        return (x.real * self.twist.real).addcmul_(x.imag, self.twist.imag)

    def _exchange(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(Exchange(torch.view_as_real(x), self.axis).wait())


@lru_cache(maxsize=8)
def _factors(tokens: int, rank: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What multiplies before and after the sum over n1: t^(n1 l) [P, 1, 1, 1] and t^n0 w_L^(n0 k1) [P, 1, 1, m].

    As a whole number of quarter steps the second is exp(-2i pi n0 (4 k1 - 1) / 4L): the product is exact in integers
    and below 4L, so that no angle leaves one turn and none loses digits before it is rounded to `dtype`.
    """
    piece = tokens // size
    across = torch.arange(size, device=device).view(-1, 1, 1, 1)
    within = torch.arange(rank * piece, (rank + 1) * piece, device=device)

    def turn(quarter_steps: Tensor, steps: int) -> Tensor:
        angle = quarter_steps.double() * (2 * math.pi / (4 * steps))
        return torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())

    return turn(across, size), turn(within * (1 - 4 * across), tokens * size)


def _filter_rows(h: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """[c, P, m] -> [P, 1, c, m] with the bias, which is a direct term, added to lag 0 on the rank that has it."""
    rows = h.movedim(1, 0).unsqueeze(1)
    if axis.rank == 0:
        rows = rows.clone()
        rows[0, 0, :, 0] += bias
    return rows


def _to_strided(x: Tensor, axis: Axis) -> Tensor:
    """[..., l] -> [P, ..., m], a view: what an exchange sends to each rank. The exchange completes the layout."""
    return x.unflatten(-1, (axis.size, -1)).movedim(-2, 0)


def _to_slice(x: Tensor) -> Tensor:
    """[P, ..., m] -> [..., l]: what came from each rank, side by side."""
    return x.movedim(0, -2).flatten(-2)


def part_elements(elements_per_channel: int, device: torch.device) -> int:
    """Elements of the channels that are transformed together, at least one."""
    limit = EXCHANGED_ELEMENTS if device.type == "cpu" else EXCHANGED_ELEMENTS * GPU_EXCHANGE_FACTOR
    return max(1, limit // elements_per_channel) * elements_per_channel


def _channel_parts(channels: int, elements_per_channel: int, device: str = "cpu") -> Iterator[slice]:
    """Cut the channels into slices of about EXCHANGED_ELEMENTS elements, at least one channel each."""
    step = part_elements(elements_per_channel, torch.device(device)) // elements_per_channel
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """The same items, each when the next has been made: an exchange that is an item is in flight meanwhile."""
    previous: list[_Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _compute_dtype(u: Tensor, h: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(u.dtype, h.dtype), torch.float32)
