"""HyenaDNA's implicit filter: a small sine MLP of the position, under an exponential window (Poli et al. 2023, eq. 7).

    h[c, n] = (W_last sin(w (... W_1 sin(w (W_0 z_n + b_0)) + b_1 ...)))[c] * (exp(t_n delta_c) + shift)

One function gives any channel rows at any range of lags. Legend: E positional features, F trunk width, R rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.backends import filter_kernels
from hyena_dist.ops.chunking import GPU_FACTOR
from hyena_dist.ops.precision import accumulate, accumulate_product, without_autocast

LAGS_PER_CHUNK = 2048
"""Lags whose [lags, F] trunk activations live at one time on a CPU: 0.5 MB each at F = 64 in float32, ten in a backward
pass. Elsewhere they are GPU_FACTOR times as many."""

KEPT_LAGS = 2**15
"""The most lags of which a model without context parallelism keeps the trunk for the backward pass: 51 MB a layer in
float32 at F = 64, for a tenth of a narrow model's time. On longer inputs memory is dearer."""

FAST_DECAY, SLOW_DECAY, DECAY_TARGET = 0.3, 1.5, 1e-2


def keeps_trunk(lags: int) -> bool:
    """Whether a model without context parallelism and recomputation keeps the trunk of an input of this length."""
    return lags <= KEPT_LAGS


@dataclass(frozen=True)
class FilterShape:
    """What the filter is a function of besides its weights."""

    seq_len: int
    """Lags over which positions are normalised: t runs from 0 to 1 over them, and on beyond 1 past them."""
    emb_dim: int
    """Positional features: time, and (emb_dim - 1) / 2 cosines and sines."""
    shift: float
    """Constant added to the decay window."""


@lru_cache(maxsize=2)
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def _grids(seq_len: int) -> tuple[Tensor, Tensor]:
    """(t in [0, 1], position in [0, seq_len - 1]), each [seq_len] float32: slices of them are those of the whole."""
    return torch.linspace(0, 1, seq_len), torch.linspace(0, seq_len - 1, seq_len)


def _positions(seq_len: int, lags: slice) -> tuple[Tensor, Tensor]:
    """(t, position) at a range of lags, each [n] float32: from the grids, and past their end on along the same line."""
    t, position = (grid[lags] for grid in _grids(seq_len))
    if lags.stop <= seq_len:
        return t, position
    beyond = torch.arange(max(lags.start, seq_len), lags.stop, dtype=torch.float64)
    return torch.cat([t, (beyond / max(seq_len - 1, 1)).float()]), torch.cat([position, beyond.float()])


def time(shape: FilterShape, lags: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
    """t at a range of lags: [n]. From float32, then cast, as published: float64 positions change logits by 1e-7."""
    t = _positions(shape.seq_len, lags)[0] if device.type == "cpu" else _kept(shape, lags, device)[0][lags]
    return t.to(dtype)


def positional_features(shape: FilterShape, lags: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
    """z at a range of lags: [n, E] = time, cosines, negative sines; a slice equals that of the whole bit for bit.

    Always computed on the CPU, because a sine has other bits on a GPU, and a model moves between them."""
    z = _features(shape, lags) if device.type == "cpu" else _kept(shape, lags, device)[1][lags]
    return z.to(dtype)


def _features(shape: FilterShape, lags: slice) -> Tensor:
    bands = (shape.emb_dim - 1) // 2
    t, position = (column[:, None] for column in _positions(shape.seq_len, lags))
    frequencies = torch.linspace(1e-4, bands - 1, bands)
    phase = torch.exp(-1j * frequencies * (2 * math.pi * position / shape.seq_len))
    return torch.cat([t, phase.real, phase.imag], dim=1)


def _kept(shape: FilterShape, lags: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    past = lags.stop > shape.seq_len
    return _features_on(shape, 1 << (lags.stop - 1).bit_length() if past else shape.seq_len, device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def _features_on(shape: FilterShape, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(t, z) of every lag before `end`: a GPU keeps them, 24 MB for a million lags, so that a step copies nothing."""
    every = slice(0, end)
    return _positions(shape.seq_len, every)[0].to(device), _features(shape, every).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def decay_rates(num_channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """delta of every channel of a filter: [D], from ln(target) / slow to ln(target) / fast, which are negative.
    Computed on the CPU."""
    log_target = math.log(DECAY_TARGET)
    return torch.linspace(log_target / SLOW_DECAY, log_target / FAST_DECAY, num_channels).to(device, dtype)


def implicit_filter(trunk: list[tuple[Tensor, Tensor]], freq: Tensor, last_weight: Tensor, decay: Tensor,
                    shape: FilterShape, lags: slice, *, recompute: bool = True,
                    backend: str = "auto") -> Tensor:
    """The filter's rows at a range of lags: [R, lags.stop - lags.start], contiguous.

    Args:
        trunk: (weight [F, E or F], bias [F]) of every layer before the last.
        freq: [F], the sine activations' frequency, shared by all layers.
        last_weight: [R, F], the rows wanted of the last layer.
        decay: [R], their decay rates, none of them positive.
        lags: start and stop; past shape.seq_len the positions go on along the same line.
        recompute: the backward pass recomputes the trunk and the window in chunks of lags, so that no [lags, F] tensor
            outlives a chunk. Else they are kept, and a graph is good for one backward pass. Kernels recompute always.
        backend: auto, torch or triton (`ops.backends`).
    """
    flat = [tensor for pair in trunk for tensor in pair]
    kernels = filter_kernels(backend, flat[0], last_weight)
    if kernels:
        return _ByKernels.apply(kernels, shape, lags, decay, freq, last_weight, *flat)
    return _ImplicitFilter.apply(shape, lags, recompute or not torch.is_grad_enabled(), decay, freq, last_weight, *flat)


def implicit_filter_reference(trunk: list[tuple[Tensor, Tensor]], freq: Tensor, last_weight: Tensor, decay: Tensor,
                              shape: FilterShape, lags: slice) -> Tensor:
    """The same function in one piece, through autograd."""
    with without_autocast(freq):
        activation = positional_features(shape, lags, freq.dtype, freq.device)
        for weight, bias in trunk:
            activation = torch.sin(freq * F.linear(activation, weight, bias))
        return last_weight.mm(activation.t()) * _window(decay, shape, lags)


class _ImplicitFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: FilterShape, lags: slice, recompute: bool, decay: Tensor, freq: Tensor,
                last_weight: Tensor, *weights: Tensor) -> Tensor:
        ctx.shape, ctx.lags, ctx.layers = shape, lags, len(weights) // 2
        h = torch.empty(len(decay), lags.stop - lags.start, dtype=decay.dtype, device=decay.device)
        trunk, kept = _Trunk(freq, weights), []
        with without_autocast(freq):
            for part, place in _parts(lags, freq.device):
                tape = trunk.forward(positional_features(shape, part, freq.dtype, freq.device))
                window = _window(decay, shape, part)
                torch.mul(last_weight.mm(tape[-1].t()), window, out=h[:, place])
                kept += [] if recompute else [window, *tape]
                del tape, window  # before there are the next ones
        ctx.save_for_backward(decay, freq, last_weight, *weights, *kept)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        decay, freq, last_weight, *rest = ctx.saved_tensors
        weights, kept = rest[: 2 * ctx.layers], iter(rest[2 * ctx.layers :])
        trunk, dlast = _Trunk(freq, weights), None
        with without_autocast(freq):
            for part, place in _parts(ctx.lags, freq.device):
                window, *tape = (list(islice(kept, 3 * ctx.layers + 2))
                                 or [_window(decay, ctx.shape, part), *trunk.forward(
                                     positional_features(ctx.shape, part, freq.dtype, freq.device))])
                grad = window.mul_(dh[:, place])
                dlast = accumulate_product(dlast, grad, tape[-1], grad.dtype)
                trunk.backward(tape, grad.t().mm(last_weight))
        dfreq, *dweights = trunk.gradients
        return None, None, None, None, dfreq, dlast, *dweights


class _ByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, shape: FilterShape, lags: slice, decay: Tensor, *tensors: Tensor) -> Tensor:
        ctx.kernels, ctx.shape, ctx.lags = kernels, shape, lags
        ctx.save_for_backward(decay, *tensors)
        freq, last_weight, *weights = tensors
        features = positional_features(shape, lags, freq.dtype, freq.device)
        return kernels.forward(features, weights, freq, last_weight, decay, shape.shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        decay, freq, last_weight, *weights = ctx.saved_tensors
        features = positional_features(ctx.shape, ctx.lags, freq.dtype, freq.device)
        gradients = ctx.kernels.backward(features, dh, weights, freq, last_weight, decay, ctx.shape.shift)
        return None, None, None, None, *gradients


def _parts(lags: slice, device: torch.device) -> list[tuple[slice, slice]]:
    """Chunks of the lags, and their places in the range. They start at multiples of their length, so that a lag's value
    does not depend on the range that it is asked in."""
    step = LAGS_PER_CHUNK if device.type == "cpu" else LAGS_PER_CHUNK * GPU_FACTOR
    edges = [lags.start, *range((lags.start // step + 1) * step, lags.stop, step), lags.stop]
    return [(slice(start, stop), slice(start - lags.start, stop - lags.start)) for start, stop in pairwise(edges)]


class _Trunk:
    """The trunk on chunks of lags, and its gradients, summed over the chunks.

    `weights` are weight, bias, weight, bias, ...
    """

    def __init__(self, freq: Tensor, weights: Sequence[Tensor]) -> None:
        self._freq, self._weights = freq, weights
        self.gradients: list[Tensor | None] = [None] * (1 + len(weights))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Positional features [n, E] -> what every layer reads, makes of it, and takes the sine of, and last what the
        last layer reads, [n, F]."""
        tape = [features]
        for weight, bias in zip(self._weights[::2], self._weights[1::2], strict=True):
            z = torch.addmm(bias, tape[-1], weight.t())
            phase = self._freq * z
            tape += [z, phase, phase.sin()]
        return tape

    def backward(self, tape: list[Tensor], grad: Tensor) -> None:
        """Add the gradients of a chunk, from that at its result. Uses up the tape."""
        while len(tape) > 1:
            del tape[-1]  # what the next layer read
            phase, z, activation = tape.pop(), tape.pop(), tape[-1]
            layer = 2 * (len(tape) // 3)
            grad = phase.cos_().mul_(grad)
            self._add(0, z.t().mm(grad).diagonal())
            grad.mul_(self._freq)
            # Not addmm_, which rounds at the size of the total with every few products: seven times as wrong.
            self._add(1 + layer, grad.t().mm(activation))
            self._add(2 + layer, grad.sum(0))
            if layer:  # the features have no gradient
                grad = grad.mm(self._weights[layer])

    def _add(self, place: int, part: Tensor) -> None:
        self.gradients[place] = accumulate(self.gradients[place], part)


def _window(decay: Tensor, shape: FilterShape, lags: slice) -> Tensor:
    """[R, n]"""
    t = time(shape, lags, decay.dtype, decay.device)
    if decay.device.type == "cpu":
        return (decay[:, None] * t).exp_().add_(shape.shift)
    return torch.pow(decay.exp()[:, None], t).add_(shape.shift)  # one pass less, where a power costs no time
