"""The functions that fuse a norm, products and what is between them, against the same by torch's own autograd: values
and the gradient of every input, in float64 and float32, in chunks so small that every loop runs several times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hyena_dist.ops import chunking, long_conv, mlp, norm
from hyena_dist.ops import hyena as hyena_module
from hyena_dist.ops import linear as lin
from hyena_dist.ops.across import Across
from hyena_dist.ops.hyena import HyenaWeights, hyena, hyena_reference
from hyena_dist.ops.long_conv import causal_conv_reference
from hyena_dist.ops.mix import MixWeights
from hyena_dist.ops.mlp import MLPWeights
from hyena_dist.ops.norm import NormWeights
from hyena_dist.ops.precision import product
from hyena_dist.ops.short_conv import ShortConvTape, short_conv_reference
from hyena_dist.ops.workspace import Workspace
from tests.compare import rel

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
D, C, TAPS = 6, 4, 3


@dataclass(frozen=True)
class Pair:
    """A fast function, its reference, and the shapes of their inputs and result."""

    fast: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: list[tuple[int, ...]]
    result: tuple[int, ...]


def normed(weights: tuple[Tensor, ...]) -> NormWeights | None:
    return NormWeights(*weights, 1e-5) if weights else None


def hyena_pair(order: int, batch: int, length: int, with_norm: bool, with_bias: bool = True, **options) -> Pair:
    shapes = [((order + 1) * C, D), ((order + 1) * C,), ((order + 1) * C, TAPS), ((order + 1) * C,),
              (order - 1, C, length), (order - 1, C), (D, C)] + [(D,)] * with_bias

    def weights(tensors: tuple[Tensor, ...]) -> tuple[HyenaWeights, NormWeights | None]:
        count = len(shapes)
        return HyenaWeights(*tensors[:count], *([] if with_bias else [None])), normed(tensors[count:])

    return Pair(lambda x, *w: hyena(x, *weights(w), **options),
                lambda x, *w: hyena_reference(x, *weights(w)) + (x if options.get("residual") else 0),
                [(length, batch, D), *shapes, *[(D,)] * (2 * with_norm)], (length, batch, D))


class OneSlice:
    """In place of the context ranks: one slice, with these tokens on its left, and nothing on its right."""

    rank, ranks, knows_segments = 0, 1, False

    def __init__(self, halo: Tensor | None = None) -> None:
        self.halo, self.dhalo = halo, torch.zeros(0)

    def from_left(self, tail: Tensor) -> Tensor:
        return torch.zeros_like(tail) if self.halo is None else self.halo.view(tail.shape)

    def from_right(self, dhalo: Tensor) -> Tensor:
        self.dhalo = dhalo
        return torch.zeros_like(dhalo)

    def convolve(self, inputs: Tensor, filters: Tensor, bias: Tensor,
                 segments: None) -> tuple[Tensor, list[Tensor]]:
        assert segments is None
        u, *gates = inputs
        steps = []
        for h, b, gate in zip(filters, bias, [*gates, None], strict=True):
            steps.append(u)
            u = long_conv.convolve(u, h, b, gate)
        return u, [*steps, *gates]

    def convolve_backward(self, dconv: Tensor, filters: Tensor, bias: Tensor, kept: list[Tensor],
                          segments: None) -> tuple[Tensor, Tensor, Tensor]:
        assert segments is None
        steps, gates = kept[: len(filters)], [*kept[len(filters) :], None]
        found = []
        for u, h, b, gate in reversed(list(zip(steps, filters, bias, gates, strict=True))):
            dconv, *rest = long_conv.convolve_backward(dconv, u, h, b, gate)
            found.insert(0, rest)
        dinner = [dgate for *_, dgate in found if dgate is not None]
        return torch.stack([dconv, *dinner]), *(torch.stack([rest[i] for rest in found]) for i in range(2))


class MixOfASlice(torch.autograd.Function):
    """`mix` of the backend of slices, with the gradient at the halo besides."""

    @staticmethod
    def forward(ctx, p: Tensor, halo: Tensor, *weights: Tensor) -> Tensor:
        u, kept = Across(OneSlice(halo)).mix(p, MixWeights(*weights), None)
        ctx.save_for_backward(p, halo, *weights, *kept)
        return u

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        p, halo, *rest = ctx.saved_tensors
        dp, exchange = p.clone(), OneSlice(halo)
        gradients = Across(exchange).mix_backward(dp, dy.clone(), MixWeights(*rest[:4]), None, rest[4:])
        return dp, exchange.dhalo.flatten(1, 2), *gradients


def mix_of_a_slice(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, filters: Tensor, direct: Tensor) -> Tensor:
    """The same through autograd."""
    *gates, u = short_conv_reference(p, weight, bias, halo).chunk(len(filters) + 2, dim=1)
    u = u * gates.pop()
    for h, b in zip(filters, direct, strict=True):
        u = causal_conv_reference(u, h, b, gates.pop())
    return u


def slice_pair(order: int) -> Pair:
    shapes = [(2, (order + 1) * C, 50), (2, (order + 1) * C, TAPS - 1), ((order + 1) * C, TAPS), ((order + 1) * C,),
              (order - 1, C, 50), (order - 1, C)]
    return Pair(MixOfASlice.apply, mix_of_a_slice, shapes, (2, C, 50))


def mlp_pair(with_norm: bool, with_bias: bool = True, **options) -> Pair:
    shapes = [(4 * D, D), (4 * D,), (D, 4 * D)] + [(D,)] * with_bias

    def weights(tensors: tuple[Tensor, ...]) -> tuple[MLPWeights, NormWeights | None]:
        count = len(shapes)
        return MLPWeights(*tensors[:count], *([] if with_bias else [None])), normed(tensors[count:])

    return Pair(lambda x, *w: mlp.mlp(x, *weights(w), **options),
                lambda x, *w: mlp.mlp_reference(x, *weights(w)) + (x if options.get("residual") else 0),
                [(37, 2, D), *shapes, *[(D,)] * (2 * with_norm)], (37, 2, D))


def linear_pair(function: Callable[..., Tensor], batch: int, layout: Callable[[Tensor], Tensor]) -> Pair:
    return Pair(lambda x, w, b, *n: function(x, w, b, normed(n)),
                lambda x, w, b, *n: layout(lin.linear_reference(x, w, b, normed(n))),
                [(37, batch, D), (9, D), (9,), (D,), (D,)], tuple(layout(torch.empty(37, batch, 9)).shape))


PAIRS = {
    "hyena": hyena_pair(2, 2, 50, True),
    "hyena, one row": hyena_pair(2, 1, 97, True),
    "hyena, no norm": hyena_pair(2, 3, 40, False),
    "hyena, no last bias": hyena_pair(2, 2, 40, True, with_bias=False),
    "hyena of order 3": hyena_pair(3, 2, 50, True),
    "hyena of order 4, recomputed": hyena_pair(4, 2, 31, True, recompute=True),
    "hyena by rfft": hyena_pair(3, 2, 50, True, method="rfft"),
    "hyena and residual": hyena_pair(2, 2, 50, True, residual=True),
    "hyena, recomputed": hyena_pair(2, 2, 50, True, recompute=True),
    "slice": hyena_pair(2, 2, 50, True, exchange=OneSlice()),
    "slice, recomputed, and residual": hyena_pair(3, 2, 50, True, exchange=OneSlice(), recompute=True, residual=True),
    "mlp": mlp_pair(True),
    "mlp, no norm": mlp_pair(False),
    "mlp, no last bias": mlp_pair(True, with_bias=False),
    "mlp and residual": mlp_pair(True, residual=True),
    "mlp, recomputed": mlp_pair(True, recompute=True),
    "linear": linear_pair(lin.linear, 2, lambda y: y),
    "to channels": linear_pair(lin.to_channels, 2, lambda y: y.permute(1, 2, 0)),
    "to channels, one row": linear_pair(lin.to_channels, 1, lambda y: y.permute(1, 2, 0)),
    "norm": Pair(lambda x, *n: norm.layer_norm(x, normed(n)), lambda x, *n: norm.layer_norm_reference(x, normed(n)),
                 [(37, 2, D), (D,), (D,)], (37, 2, D)),
    "mix of a slice": slice_pair(2),
    "mix of a slice, order 4": slice_pair(4),
}


def values_and_grads(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


@pytest.mark.parametrize("chunk", [100, 2**18])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PAIRS)
def test_fast_equals_reference(name, dtype, chunk, monkeypatch):
    check(name, dtype, chunk, monkeypatch)


@pytest.mark.parametrize("chunk", [100, 2**18])
@pytest.mark.parametrize("name", [name for name in PAIRS if name.startswith("hyena")])
def test_the_short_convolution_folded_into_the_projection_is_the_same_function(name, chunk, monkeypatch):
    """As on a GPU in half precision."""
    monkeypatch.setattr(hyena_module, "folds", lambda *_: True)
    for dtype in TOLERANCE:
        check(name, dtype, chunk, monkeypatch)


def test_folding_costs_no_precision(monkeypatch):
    """In bfloat16, beside what the projection and the short convolution one after the other cost."""
    pair, generator = PAIRS["hyena"], torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in pair.inputs]
    dy = torch.randn(pair.result, generator=generator)
    expected = values_and_grads(pair.reference, tensors, dy)
    errors = {}
    for folded in (False, True):
        monkeypatch.setattr(hyena_module, "folds", lambda *_, folded=folded: folded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = values_and_grads(pair.fast, tensors, dy)
        errors[folded] = sum(rel(a, b) for a, b in zip(found, expected, strict=True)) / len(found)
    print(f"folded {errors[True]:.1e}, apart {errors[False]:.1e}")
    assert errors[True] < 1.2 * errors[False]


def check(name: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = worst_error(name, dtype, chunk, monkeypatch)
    print(f"{name}: {error:.1e}, tolerance {TOLERANCE[dtype]}")
    assert error < TOLERANCE[dtype]


def worst_error(name: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the value and of every gradient, against the reference in float64."""
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(chunking, "LEAST_TOKENS", 5)
    monkeypatch.setattr(chunking, "LEAST_SEQUENCES", 1)
    pair, generator = PAIRS[name], torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in pair.inputs]
    dy = torch.randn(pair.result, dtype=torch.float64, generator=generator)
    expected = values_and_grads(pair.reference, exact, dy)
    found = values_and_grads(pair.fast, [t.detach().to(dtype).requires_grad_() for t in exact], dy)
    return max(rel(a, b) for a, b in zip(found, expected, strict=True))


def forgetful(_total: Tensor | None, part: Tensor) -> Tensor:
    """A sum over chunks that keeps the last one only."""
    return part


def forgetful_product(_total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return product(a, b, dtype)


def without_furthest_tap(_self: ShortConvTape, x: Tensor) -> range:
    return range(1, min(TAPS, x.shape[-1]) - 1)


def without_halo(self: ShortConvTape, x: Tensor, rows: Any, _halo: Tensor | None = None) -> Tensor:
    return FORWARD(self, x, rows)


def without_gradient_of_the_halo(self: ShortConvTape, *args: Any) -> Tensor:
    return torch.zeros_like(BACKWARD(self, *args))


def gelu_backward_of_a_constant_gate(h: Tensor, da: Tensor, _work: Workspace) -> tuple[Tensor, Tensor]:
    """gelu(h) = h gate(h), and for its gradient the first of the two terms, gate(h) + h gate'(h)."""
    a = torch.nn.functional.gelu(h, approximate="tanh")
    return a, da * a / h


FORWARD, BACKWARD = ShortConvTape.forward, ShortConvTape.backward
CONVOLVING = [name for name in PAIRS if "hyena" in name or "slice" in name]
MUTATIONS: dict[str, tuple[list[tuple[Any, str, Callable[..., Any]]], list[str]]] = {
    "the furthest tap is missing": ([(ShortConvTape, "_reached", without_furthest_tap)], CONVOLVING),
    "the halo is missing": ([(ShortConvTape, "forward", without_halo)], ["mix of a slice", "mix of a slice, order 4"]),
    "the halo has no gradient": ([(ShortConvTape, "backward", without_gradient_of_the_halo)],
                                 ["mix of a slice", "mix of a slice, order 4"]),
    "sums keep the last chunk only": (
        [*((module, "accumulate", forgetful) for module in (lin, mlp, norm)),
         *((module, "accumulate_product", forgetful_product) for module in (lin, mlp))],
        [name for name in PAIRS if not name.startswith("mix")]),
    "the slope of GELU's gate is missing": ([(mlp, "_gelu_backward", gelu_backward_of_a_constant_gate)],
                                            [name for name in PAIRS if name.startswith("mlp")]),
}
"""The controls: what is wrong in each, where, and which pairs must see it."""


@pytest.mark.parametrize(("mutation", "name"), [(mutation, name) for mutation, (_, names) in MUTATIONS.items()
                                                for name in names])
def test_control_a_mutation_is_seen(mutation, name, monkeypatch):
    for place, function, wrong in MUTATIONS[mutation][0]:
        monkeypatch.setattr(place, function, wrong)
    for dtype, tolerance in TOLERANCE.items():
        error = worst_error(name, dtype, 100, monkeypatch)
        print(f"{mutation}, {name}: {error:.1e}, tolerance {tolerance}")
        assert error > 10 * tolerance


@pytest.mark.parametrize("name", ["hyena", "mlp", "linear"])
def test_under_autocast_products_are_lowered_and_sums_are_not(name):
    """Half precision: the result in bfloat16, near that of float32; gradients of weights in float32."""
    pair, generator = PAIRS[name], torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in pair.inputs]
    dy = torch.randn(pair.result, generator=generator)
    expected = values_and_grads(pair.reference, tensors, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pair.fast(*tensors)
    assert y.dtype == torch.bfloat16
    found = [y, *torch.autograd.grad(y, tensors, dy.bfloat16())]
    assert all(grad.dtype == torch.float32 for grad in found[1:])
    worst = max(rel(a, b) for a, b in zip(found, expected, strict=True))
    print(f"{name} in bfloat16: {worst:.1e}, tolerance 0.05")
    assert 1e-4 < worst < 0.05


def test_a_graph_of_the_operator_is_good_for_one_backward_pass():
    """Its gradient is written over what it saved: a second pass is an error, not a wrong gradient."""
    pair = PAIRS["hyena"]
    tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in pair.inputs]
    y = pair.fast(*tensors).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_sums_over_a_million_tokens_keep_their_digits():
    """The gradient of a norm's bias, a sum over all tokens; the control is torch's kernel, which sums in one run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**20, 8, generator=generator)
    dy = torch.rand(2**20, 8, generator=generator)
    weights = [torch.ones(8).requires_grad_(), torch.zeros(8).requires_grad_()]
    exact = dy.double().sum(0)
    errors = [rel(torch.autograd.grad(function(x, normed(weights)), weights[1], dy)[0], exact)
              for function in (norm.layer_norm, norm.layer_norm_reference)]
    print(f"chunks {errors[0]:.1e}, tolerance 1e-6; one run {errors[1]:.1e}")
    assert errors[0] < 1e-6 < 1e-5 < errors[1]
