"""The parts of a Hyena layer, forward and backward: long convolution, implicit filter, mixer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baseline import fft_causal_conv
from benchmarks.compare import BASELINE, OURS, TOLERANCE, VALUE, YARDSTICK_TOLERANCE, Case, Measured, Results, Side
from benchmarks.models import Models, Size, autocast, published
from hyena_dist.costs.flops import parts, training_bytes
from hyena_dist.ops import libraries
from hyena_dist.ops.implicit_filter import keeps_trunk
from hyena_dist.ops.long_conv import causal_conv
from hyena_dist.ops.mix import Asked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXER = "layers.0.mixer."

Conv = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def conv(size: Size, device: torch.device, precision: str) -> Case:
    """y = gate * (h (*) u + bias * u) and all four gradients; u, gate, y in the precision, h and bias in float32."""
    B, D, L, dtype = size.batch, size.width, size.length, DTYPES[precision]

    def inputs(turn: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(turn)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        u, gate, dy = (random(B, D, L).to(dtype) for _ in range(3))
        decay = torch.linspace(1, 8, D, device=device)[:, None] * torch.linspace(0, 1, L, device=device)
        return u, random(D, L) * torch.exp(-decay) * L**-0.5, random(D), gate, dy

    exact = _conv_side(_plain_conv, torch.float64)
    moved = 8 * dtype.itemsize * B * D * L + 3 * 4 * D * L  # u and gate twice, dy; y, du, dgate; h twice, dh
    sides = {OURS: Measured(_conv_side(causal_conv), exact, TOLERANCE[precision], moved),
             BASELINE: Measured(_conv_side(_plain_conv), exact, YARDSTICK_TOLERANCE[precision], moved)}
    missing = {}
    for name in libraries.PACKAGES:
        found = library_conv(name, L, device, precision)
        if isinstance(found, str):
            missing[name] = found
        else:
            sides[name] = Measured(_conv_side(found), exact, YARDSTICK_TOLERANCE[precision], moved)
    return Case(L, B, inputs, sides, missing)


def _plain_conv(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return fft_causal_conv(u, h, bias) * gate


def _conv_side(function: Conv, dtype: torch.dtype | None = None) -> Side:
    def run(inputs: tuple[Tensor, ...]) -> Results:
        *given, dy = (x.to(dtype or x.dtype) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in given]
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, dy)
        return lambda: {VALUE: y.detach(), **dict(zip(("du", "dh", "dbias", "dgate"), grads, strict=True))}
    return run


def library_conv(name: str, length: int, device: torch.device, precision: str) -> Conv | str:
    """A library's convolution (`ops.libraries`) on our contract, or why it cannot be measured here."""
    if not libraries.installed(name):
        return f"{name} is not installed"
    dtype = DTYPES[precision]
    if reason := libraries.refusal(name, Asked(device, dtype, order=2, taps=1, length=length)):
        return reason
    convolve = libraries.convolve_by(name, length, dtype, device)

    def run(u: Tensor, h: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return gate * (convolve(u, h) + bias.to(u.dtype)[:, None] * u)

    return run


@dataclass(frozen=True)
class Inputs:
    """The same numbers in the layout of each: what goes in, if anything, and last the output's gradient."""

    ours: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]


def implicit_filter(size: Size, device: torch.device, precision: str) -> Case:
    """The filter of one mixer at all lags, [D, L], and its weights' gradients; always in float32."""
    assert precision == "fp32"

    def inputs(turn: int) -> Inputs:
        dh = torch.randn(size.width, size.length, generator=torch.Generator(device).manual_seed(turn), device=device)
        return Inputs((dh,), (dh,))

    models = Models.build(Size(size.length, size.width, layers=1), device)
    lags, recompute = [slice(0, size.length)], not keeps_trunk(size.length)
    ours = models.ours.layers[0].mixer.filter
    baseline, exact = (model.backbone.layers[0].mixer.filter_fn for model in (models.baseline, models.exact))
    return _case(size, inputs, "fp32", ("filter",),
                 _our_side(models, "filter.", lambda: ours(lags, recompute=recompute)[0], lambda h: h),
                 _plain_side(baseline, "filter_fn.", lambda: baseline(size.length)),
                 _plain_side(exact, "filter_fn.", lambda: exact(size.length), torch.float64))


def mixer(size: Size, device: torch.device, precision: str) -> Case:
    """One Hyena mixer with everything in it, from [B, L, D] to the same, and the gradients of x and of every weight;
    under autocast in half precision. Each side gets its own layout."""

    def inputs(turn: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(turn)
        x, dy = (torch.randn(size.batch, size.length, size.width, generator=generator, device=device)
                 for _ in range(2))
        return Inputs((x.transpose(0, 1).contiguous(), dy.transpose(0, 1).contiguous()), (x, dy))

    def cast(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with autocast(device, precision):
                return call(x)
        return run

    models = Models.build(Size(size.length, size.width, layers=1), device)
    ours = models.ours.layers[0].mixer
    baseline, exact = (model.backbone.layers[0].mixer for model in (models.baseline, models.exact))
    return _case(size, inputs, precision, ("projections", "short_conv", "filter", "long_conv"),
                 _our_side(models, "", cast(lambda x: ours(x)[0]), lambda y: y.transpose(0, 1)),
                 _plain_side(baseline, "", cast(baseline)), _plain_side(exact, "", exact, torch.float64))


def _case(size: Size, inputs: Callable[[int], Inputs], precision: str, names: tuple[str, ...], ours: Side,
          baseline: Side, exact: Side) -> Case:
    whole = parts(Size(size.length, size.width, layers=1).section(), size.length, size.batch)
    moved = sum(training_bytes(whole[name], DTYPES[precision].itemsize) for name in names)
    return Case(size.length, size.batch, inputs,
                {OURS: Measured(ours, exact, TOLERANCE[precision], moved),
                 BASELINE: Measured(baseline, exact, YARDSTICK_TOLERANCE[precision], moved)})


def _our_side(models: Models, prefix: str, call: Callable[..., Tensor], plain: Callable[[Tensor], Tensor]) -> Side:
    """A part of our mixer; `plain` gives the layout of the baseline."""
    weights = {name: weight for name, weight in models.ours.named_parameters() if name.startswith(MIXER + prefix)}

    def run(inputs: Inputs) -> Results:
        y, dx, grads = _pass(call, inputs.ours, list(weights.values()))

        def collect() -> dict[str, Tensor]:
            by_name = published(models.ours, dict(zip(weights, grads, strict=True)))
            return {VALUE: plain(y), **{name: plain(grad) for name, grad in dx.items()}, **by_name}
        return collect
    return run


def _plain_side(module: nn.Module, prefix: str, call: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Side:
    """The same of the baseline's mixer."""
    weights = {f"backbone.{MIXER}{prefix}{name}": weight for name, weight in module.named_parameters()
               if prefix == "" or name != "bias"}  # of a filter alone, the direct term's weight is not used

    def run(inputs: Inputs) -> Results:
        y, dx, grads = _pass(call, tuple(x.to(dtype or x.dtype) for x in inputs.plain), list(weights.values()))
        return lambda: {VALUE: y, **dx, **dict(zip(weights, grads, strict=True))}
    return run


def _pass(call: Callable[..., Tensor], inputs: tuple[Tensor, ...],
          weights: list[Tensor]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Forward and backward: (output, the input's gradient if there is an input, gradients of the weights)."""
    *given, dy = inputs
    leaves = [x.detach().requires_grad_() for x in given]
    y = call(*leaves)
    grads = torch.autograd.grad(y, [*leaves, *weights], dy.to(y.dtype))
    return y.detach(), dict(zip(["dx"] * len(leaves), grads, strict=False)), list(grads[len(leaves) :])
