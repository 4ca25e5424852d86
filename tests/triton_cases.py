"""Kernels in Triton's interpreter against float64. It must be asked for before the kernels are imported, so this is a
process of its own: `python -m tests.triton_cases NAME ...` prints {name: {what: error}} as JSON.

Every tensor that a kernel gets or makes stands between bands of NaN, and what it makes is NaN before: what is left out
spoils the result. An address outside its tensor is refused (`tests.triton_bounds`).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.counting import CallCounter
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.ops import OpsSection
from hyena_dist.convert import from_published, to_published
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.ops.across import Across
from hyena_dist.ops.costs import declared_cost
from hyena_dist.ops.hyena import HyenaWeights, hyena
from hyena_dist.ops.long_conv import causal_conv_reference
from hyena_dist.ops.mix import MixWeights, mix_reference
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton import groups as triton_groups
from hyena_dist.ops.triton import long_row, short
from hyena_dist.ops.triton import operator as triton_operator
from hyena_dist.ops.triton.groups import Operator, Plan, convolution
from hyena_dist.ops.triton.plans import LargePlan, SmallPlan, plan_for
from hyena_dist.parallel.groups import Groups
from tests import triton_bounds, triton_sizes
from tests.triton_traffic import Traffic
from tests.unit.test_convert import golden
from tests.unit.test_fused import OneSlice


def rounded(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """The interpreter cuts bfloat16 off, where a GPU rounds."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()
    return convert_float(values, source, target, mode)


convert_float, interpreter._convert_float = interpreter._convert_float, rounded
triton_bounds.check()

BAND = 64
THREE_SMALL = LargePlan(3, 16, 16, 16, 16, 32)
POISON = 2**30
"""Of integers, which would be no place."""
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Bands:
    """Tensors between bands of NaN."""

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._empty = torch.empty

    def around(self, tensor: Tensor) -> Tensor:
        poison = float("nan") if tensor.is_floating_point() or tensor.is_complex() else POISON
        place = torch.full((tensor.numel() + 2 * BAND,), poison, dtype=tensor.dtype)
        self._places.append(place)
        inside = place[BAND:-BAND].view(tensor.shape)
        return inside.copy_(tensor)

    @contextlib.contextmanager
    def of_everything_made(self):
        def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            size = shape[0] if isinstance(shape[0], torch.Size) else shape
            return self.around(torch.full(size, float("nan"), dtype=dtype, device=device))
        torch.empty = empty
        try:
            yield
        finally:
            torch.empty = self._empty

    def whole(self) -> bool:
        ends = [end for place in self._places for end in (place[:BAND], place[-BAND:])]
        return all(bool((end.isnan() | (end == POISON)).all()) for end in ends)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, 2-norms; infinite where a has NaN."""
    error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def reference(p: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, h: Tensor, direct: Tensor,
              segments: Segments | None = None) -> dict[str, Tensor]:
    """y and every gradient by the references in float64. A short convolution of no taps is none."""
    leaves = [t.double().requires_grad_() for t in (p.flatten(1, 2), weight, bias, h, direct)]
    given = MixWeights(*leaves[1:]) if weight.shape[1] else MixWeights(None, None, *leaves[3:])
    y = mix_reference(leaves[0], given, segments)
    y.backward(dy.double())
    grads = [torch.zeros(0) if leaf.grad is None else leaf.grad for leaf in leaves]
    grads[0] = grads[0].view(p.shape)
    return dict(zip(("y", "dp", "dweight", "dbias", "dh", "ddirect"), (y.detach(), *grads), strict=True))


def inputs(batch: int, channels: int, length: int, taps: int, dtype: torch.dtype = torch.float32,
           order: int = 2) -> list[Tensor]:
    """p, dy, weight, bias, h, direct."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    h = normal(order - 1, channels, length) * torch.exp(-torch.arange(length) / (length / 5))
    blocks = order + 1
    return [normal(batch, blocks, channels, length).to(dtype), normal(batch, channels, length).to(dtype),
            normal(blocks * channels, taps), normal(blocks * channels), h, normal(order - 1, channels)]


def compare(given: list[Tensor], plan: Plan, rows: slice = slice(None),
            offsets: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
    """Errors of both directions by a plan, of some channels, and whether anything was written outside. With segments
    their offsets; the filters then have lags that none reaches."""
    p, batch = given[0], len(given[0])
    segments = None if offsets is None else Segments(offsets, batch, p.shape[-1])
    want = reference(*given, segments)
    bands = Bands()
    p, dy, *weights = (bands.around(t) for t in given)
    taps = given[2].shape[1]
    if not taps:
        weights[:2] = None, None
    if segments:
        places, sizes = segments.by_size(p.device)
        run = Operator.in_segments(p, *weights[:2], bands.around(places),
                                   bands.around(segments.positions(p.device).int()), sizes, lambda _size: plan)
    else:
        run = Operator.whole(p, *weights[:2], plan)
    with bands.of_everything_made():
        y = run.mix(*weights[2:])
        grads = run.mix_backward(dy, *weights[2:])
    blocks = p.shape[1]
    found = {"y": y, "dp": p, "dweight": grads[0], "dbias": grads[1], "dh": grads[2], "ddirect": grads[3]}
    of_channels = {"y": lambda t: t[:, rows], "dp": lambda t: t[:, :, rows], "dh": lambda t: t[:, rows],
                   "ddirect": lambda t: t[:, rows], "dweight": lambda t: t.unflatten(0, (blocks, -1))[:, rows],
                   "dbias": lambda t: t.unflatten(0, (blocks, -1))[:, rows]}
    errors = {name: relative(part(found[name]), part(want[name])) for name, part in of_channels.items()
              if taps or name not in ("dweight", "dbias")}
    errors["y again"] = relative(dy[:, rows], want["y"][:, rows])
    errors["outside"] = 0.0 if bands.whole() else float("inf")
    return errors


def hard(what: str, dtype: torch.dtype, plan: SmallPlan | LargePlan) -> dict[str, float]:
    """Rows on which scales or sums could break, without the short convolution's mixing."""
    length, points = 250, plan.n1 * plan.n2
    given = inputs(2, 2, length, 1, dtype=dtype)
    p, dy, weight, bias, h, direct = given
    weight.fill_(1)
    bias.zero_()
    t = torch.arange(length)
    tone = torch.cos(2 * math.pi * 36.75 / points * t)
    match what:
        case "zeros":
            p.zero_()
        case "constant":
            p.fill_(1)
            h.fill_(1)
        case "tone":
            p[:, 1] = tone
            p[:, 2] = 1
            h[:] = tone
        case "loud":
            p[:, 1:] = 1
            p[:, 1, :, length // 3] = 3000
        case "huge":
            p[:, 1:] *= 1e15
            h *= 1e-20
        case "tiny":
            p[:, 1:] *= 1e-15
            h *= 1e10
        case "nan":
            p[0, 1, 0, 17] = float("nan")
    return compare(given, plan, rows=slice(1 if what == "nan" else 0, None))


HARD = ("zeros", "constant", "tone", "loud", "huge", "tiny", "nan")


def by_cufft(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return compare(inputs(*shape, dtype=dtype), None)


def by_kernels(*shape: int, dtype: torch.dtype, plan: Plan = None, order: int = 2) -> dict[str, float]:
    """With a plan of small tiles, or that of the length."""
    plan = plan or plan_for(shape[2], dtype == torch.float32, True)
    return compare(inputs(*shape, dtype=dtype, order=order), plan)


def in_segments(*shape: int, offsets: Sequence[Sequence[int]], dtype: torch.dtype, plan: Plan,
                order: int = 2) -> dict[str, float]:
    """Segments of several sizes."""
    return compare(inputs(*shape, dtype=dtype, order=order), plan, offsets=offsets)


def whole_operator(order: int = 2, **options: Any) -> dict[str, float]:
    """`hyena` with its products, by kernels and by torch's operations in float64: y and every gradient."""
    draw, rows = torch.Generator().manual_seed(1), 4 * (order + 1)
    shapes = [(53, 2, 6), (rows, 6), (rows,), (rows, 3), (rows,), (order - 1, 4, 53), (order - 1, 4), (6, 4), (6,)]
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        draw.manual_seed(1)
        x, *weights = leaves = [torch.randn(*shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
        y = hyena(x, HyenaWeights(*weights), backend=backend, **options)
        results.append([y, *torch.autograd.grad(y, leaves, torch.randn(*y.shape, generator=draw).to(dtype))])
    return {str(i): relative(a.detach(), b.detach()) for i, (a, b) in enumerate(zip(*results, strict=True))}


def registration() -> dict[str, float]:
    """torch's checks of a custom operator, and a compiled call of it without a break."""
    importlib.import_module("hyena_dist.ops.triton.operator")  # which registers them
    p, dy, *weights = inputs(2, 2, 64, 3)
    want, p = reference(p, dy, *weights), p.flatten(1, 2)
    whole = None, None, []
    checks = [torch.library.opcheck(torch.ops.hyena.mix.default, (p, *weights, *whole)),
              torch.library.opcheck(torch.ops.hyena.mix_backward.default, (p.clone(), dy, *weights, *whole))]
    compiled = torch.compile(lambda p: torch.ops.hyena.mix(p, *weights, *whole) + 1, backend="aot_eager",
                             fullgraph=True)
    return {"failed": float(sum(result != "SUCCESS" for found in checks for result in found.values())),
            "compiled": relative(compiled(p) - 1, want["y"])}


def kept_spectra(*shape: int, order: int = 2, spoilt: bool = False) -> dict[str, float]:
    """By spectra that the forward pass has kept nothing differs in any bit, and the filters are not read again. The
    control spoils a spectrum."""
    p, dy, *weights = inputs(*shape, dtype=FP16, order=order)
    results, backends = [], (triton_operator, triton_operator.Keeping())
    with (patch.object(triton_operator, "plan_for", return_value=THREE_SMALL),
          patch.object(triton_groups, "GROUP_ELEMENTS", 1)):  # a channel at a time
        for backend in backends:
            q, gradient, given = p.flatten(1, 2).clone(), dy.clone(), MixWeights(*weights)
            y, kept = backend.mix(q, given, None)
            if backend.keeps_spectra:
                kept[0][:, 0] *= 1 - spoilt
                given = given._replace(filters=torch.full((), float("nan")).expand(given.filters.shape))
            results.append([y, *backend.mix_backward(q, gradient, given, None, kept), q, gradient])
    pairs = list(zip(*results, strict=True))
    if spoilt:
        return {"y": max(relative(a, b) for a, b in pairs)}
    return {"different": float(sum(not torch.equal(a, b) for a, b in pairs))}


def registration_of_spectra() -> dict[str, float]:
    """torch's checks of both operators; bytes as they declare."""
    p, dy, *weights = inputs(2, 1, 764, 1, dtype=FP16)
    errors, given = {}, [p.flatten(1, 2), *weights]
    with patch.object(triton_operator, "plan_for", return_value=THREE_SMALL):
        spectra = torch.ops.hyena.mix_and_keep(*given)[1:]
        calls = {"mix_and_keep": given, "mix_backward_of_spectra": [
            given[0].clone(), dy, *weights[:2], list(weights[2].shape), weights[3], *spectra]}
        run = Operator.whole(p, *weights[:2], THREE_SMALL, spectra)
        tables = convolution(run._given(0, slice(0, 1), None, run.rows[0][0]), THREE_SMALL).tables()
        for name, arguments in calls.items():
            operator, traffic = getattr(torch.ops.hyena, name), Traffic(tables)
            found = torch.library.opcheck(operator.default, arguments)
            errors[f"{name} failed"] = float(sum(result != "SUCCESS" for result in found.values()))
            with traffic.counted():
                operator(*arguments)
            errors[name] = abs(traffic.bytes / declared_cost(f"hyena::{name}")(*arguments).bytes - 1)
    return errors


def training(steps: int = 50) -> dict[str, float]:
    """The loss of a small model by kernels and by torch's operations, the largest difference over the loss."""
    losses = []
    for backend in ("triton", "torch"):
        config = Config(model=ModelSection(num_layers=2, hidden_size=8, max_seq_len=64, embed_dropout=0.0),
                        ops=OpsSection(backend=backend))
        model = build_model(config, Groups.single())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(7, 9, (2, 65), generator=torch.Generator().manual_seed(0))
        losses.append([])
        for _ in range(steps):
            total, count = token_loss(model(ids[:, :-1]), ids[:, 1:])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(total.detach() / count))
    assert losses[1][-1] < 0.7 * losses[1][0], losses[1]
    return {"loss": max(abs(a - b) / b for a, b in zip(*losses, strict=True))}


def golden_numbers(name: str) -> dict[str, float]:
    """The published model's numbers, by kernels in float32: hidden states, logits, loss and every gradient."""
    config, weights, arrays = golden(name, FP32)
    model = from_published(config, weights)
    model.config.ops_backend = "triton"
    ids = torch.from_numpy(arrays["input_ids"].astype("int64"))
    logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    errors = {"logits": relative(logits.detach(), torch.from_numpy(arrays["logits"])),
              "loss": abs(float(loss.detach()) / float(arrays["loss"]) - 1)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    _, gradients = to_published(model)
    return errors | {key: relative(gradients[key.removeprefix("grad/")], torch.from_numpy(value))
                     for key, value in arrays.items() if key.startswith("grad/")}


def in_half_precision(recompute: str, precision: str = "bf16") -> dict[str, float]:
    """A whole model under autocast, some recomputed, by kernels; against float64 by torch's operations. Recomputation
    (non-reentrant) changes no bit."""
    results = []
    section = ModelSection(num_layers=2, hidden_size=16, max_seq_len=64, filter_order=16, embed_dropout=0.0)
    ids = torch.randint(7, 11, (2, 65), generator=torch.Generator().manual_seed(0))
    for backend, kind, checkpointing in (("triton", precision, recompute), ("triton", precision, "none"),
                                         ("torch", "fp64", "none")):
        config = hyena_config(section, precision="fp32" if kind == "fp64" else kind, backend=backend,
                              activation_checkpointing=checkpointing,
                              params_dtype=torch.float64 if kind == "fp64" else FP32)
        model = HyenaModel(config)
        initialize(model, model.placement(), model.tensor, seed=5)
        total, count = token_loss(model.train()(ids[:, :-1]), ids[:, 1:])
        (total / count).backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    found, again, want = results
    assert all(torch.equal(found[name], again[name]) for name in found)
    return {name: relative(found[name], want[name]) for name in want}


def far_apart() -> dict[str, float]:
    """Rows that begin more than 2^31 elements apart: of memory that is never touched between them."""
    given, far = inputs(2, 1, 64, 3, dtype=FP16), 2**31 + 64
    place = torch.empty(far + 3 * 64, dtype=FP16)
    p = place.as_strided((2, 3, 1, 64), (far, 64, 64, 1)).copy_(given[0])
    want = reference(*given)
    run = Operator.whole(p, *given[2:4], SmallPlan(4, 16, 16))
    y, dy = run.mix(*given[4:]), given[1].clone()
    run.mix_backward(dy, *given[4:])
    return {"y": relative(y, want["y"]), "dp": relative(p, want["dp"])}


def declared(*shape: int, dtype: torch.dtype, plan: SmallPlan | LargePlan, order: int = 2) -> dict[str, float]:
    """Bytes that are loaded and stored, and launches, against those that are declared: how far off."""
    p, dy, weight, bias, h, direct = inputs(*shape, dtype=dtype, order=order)
    run = Operator.whole(p, weight, bias, plan)
    tables = convolution(run._given(0, slice(0, 1), None, run.rows[0][0]), plan).tables()
    short._before_programs(p.shape[-1], 1, p.device)  # which is kept from the first call on
    errors = {}
    for name, backward, work in (("forward", False, lambda: run.mix(h, direct)),
                                 ("backward", True, lambda: run.mix_backward(dy, h, direct))):
        traffic, cost = Traffic(tables), run.cost(backward)
        with traffic.counted(), CallCounter(p.device) as calls:
            work()
        errors[name] = abs(traffic.bytes / cost.bytes - 1)
        errors[f"{name}'s launches"] = float(abs(traffic.launches + calls.total.launches - cost.launches))
    return errors


def swapped_twiddles() -> dict[str, float]:
    """The control: twiddles of the other sign."""
    given = inputs(1, 1, 601, 3)
    kept = long_row.twiddles
    long_row.twiddles = lambda *sizes: kept(*sizes) * torch.tensor([1, -1])[:, None, None]
    try:
        y = Operator.whole(given[0], *given[2:4], LargePlan(3, 16, 16, 16, 16, 16)).mix(*given[4:])
    finally:
        long_row.twiddles = kept
    return {"y": relative(y, reference(*given)["y"])}


def in_slices(slices: int, batch: int, channels: int, length: int, dtype: torch.dtype,
              offsets: Sequence[Sequence[int]] | None = None, plan: Plan | str = "") -> dict[str, float]:
    """Rows as an all-to-all delivers them [P, S, R, l]: of another tensor S = 1 stands between them, and a row is
    channel by channel one of each window."""
    from hyena_dist.ops.triton import arrived
    bands = Bands()
    draw = torch.Generator().manual_seed(length)

    def arrive(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(0, 1).unflatten(1, (slices, -1)).transpose(0, 1)  # [P, R, l]
        place = torch.full((slices, 2, *rows.shape[1:]), float("nan"), dtype=dtype)
        place[:, 1] = rows
        return bands.around(place)[:, 1].unflatten(1, (channels, batch)).transpose(1, 2)

    u, dy = (torch.randn(batch, channels, length, generator=draw).to(dtype) for _ in range(2))
    h = torch.randn(channels, length, generator=draw) * torch.exp(-torch.arange(length) / (length / 5))
    direct = torch.randn(channels, generator=draw)
    segments = None if offsets is None else Segments(offsets, batch, length)
    leaves = [t.double().requires_grad_() for t in (u, h, direct)]
    edges = [(0, length)] * batch if segments is None else segments.rows
    want = torch.cat([torch.cat([causal_conv_reference(row[None, :, a:b], leaves[1][:, : b - a], leaves[2])
                                 for a, b in pairwise(cut)], dim=2)
                      for row, cut in zip(leaves[0], edges, strict=True)])
    gradients = torch.autograd.grad(want, leaves, dy.double())
    given, gradient, out, du = (arrive(t) for t in (u, dy, torch.full_like(u, float("nan")),
                                                    torch.full_like(u, float("nan"))))
    h, direct = bands.around(h), bands.around(direct)
    kept = arrived.plans_on
    if plan:
        arrived.plans_on = lambda _u: lambda _size: None if plan == "cufft" else plan
    with bands.of_everything_made():
        arrived.convolve(given, h, direct, out=out, segments=segments)
        dh, ddirect = arrived.convolve_backward(gradient, given, h, direct, du, segments=segments)

    arrived.plans_on = kept

    def whole(x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3).flatten(2)

    return {"y": relative(whole(out), want.detach()), "du": relative(whole(du), gradients[0]),
            "dh": relative(dh, gradients[1]), "ddirect": relative(ddirect, gradients[2]),
            "y again": relative(whole(gradient), want.detach()), "outside": 0.0 if bands.whole() else float("inf")}


def in_order(batch: int, channels: int, length: int, dtype: torch.dtype,
             offsets: Sequence[Sequence[int]] | None = None, plan: Plan | str = "") -> dict[str, float]:
    """Rows with their tokens in order, channel by channel one of each window, and a gate: as of order 3 after an
    all-to-all."""
    from hyena_dist.ops.triton import arrived
    bands, draw = Bands(), torch.Generator().manual_seed(length)

    def placed(x: Tensor) -> Tensor:
        return bands.around(x.transpose(0, 1).contiguous()).transpose(0, 1)

    u, gate, dy = (torch.randn(batch, channels, length, generator=draw).to(dtype) for _ in range(3))
    h = torch.randn(channels, length, generator=draw) * torch.exp(-torch.arange(length) / (length / 5))
    direct = torch.randn(channels, generator=draw)
    segments = None if offsets is None else Segments(offsets, batch, length)
    leaves = [t.double().requires_grad_() for t in (u, h, direct, gate)]
    edges = [(0, length)] * batch if segments is None else segments.rows
    want = leaves[3] * torch.cat([torch.cat([causal_conv_reference(row[None, :, a:b], leaves[1][:, : b - a], leaves[2])
                                             for a, b in pairwise(cut)], dim=2)
                                  for row, cut in zip(leaves[0], edges, strict=True)])
    gradients = torch.autograd.grad(want, leaves, dy.double())
    u, gate, dy, out, du, dgate = (placed(x) for x in (u, gate, dy, *[torch.full_like(u, float("nan"))] * 3))
    h, direct = bands.around(h), bands.around(direct)
    kept = arrived.plans_on
    if plan:
        arrived.plans_on = lambda _u: lambda _size: None if plan == "cufft" else plan
    with bands.of_everything_made():
        arrived.convolve(u, h, direct, gate, out=out, segments=segments)
        dh, ddirect = arrived.convolve_backward(dy, u, h, direct, du, gate, dgate, segments=segments)
    arrived.plans_on = kept
    pairs = {"y": (out, want.detach()), "du": (du, gradients[0]), "dh": (dh, gradients[1]),
             "ddirect": (ddirect, gradients[2]), "dgate": (dgate, gradients[3]), "y again": (dy, want.detach())}
    errors = {name: relative(a, b) for name, (a, b) in pairs.items()}
    return errors | {"outside": 0.0 if bands.whole() else float("inf")}


def registration_over_ranks() -> dict[str, float]:
    """torch's checks of the custom operators of order 3 over context ranks."""
    from hyena_dist.ops.triton import across, arrived
    p, dy, weight, bias, h, direct = inputs(2, 2, 40, 3, order=3)
    given, row = (p, torch.randn(2, 4, 2, 2), weight, bias, None), (dy, h[0], direct[0], p[:, 0])
    calls = [(across.enter, given), (across.leave, (*given, dy)), (across.leave_backward, (*given, dy.clone(), dy)),
             (across.enter_backward, (*given, torch.randn(2, *dy.shape))),
             (arrived._convolve, (*row, torch.zeros_like(dy), None, [])),
             (arrived._convolve_backward, (dy.clone(), *row, *torch.zeros(2, *dy.shape), None, []))]
    return {"failed": float(sum(result != "SUCCESS" for operator, arguments in calls
                                for result in torch.library.opcheck(operator, arguments).values()))}


class Slice(OneSlice):
    """An exchange of the last of two slices, whose convolutions know nothing of the first, and of no segments; they are
    torch's."""

    rank, ranks, knows_segments = 1, 2, True

    def convolve(self, inputs: Tensor, filters: Tensor, bias: Tensor, _segments: Segments | None):
        return super().convolve(inputs, filters, bias, None)

    def convolve_backward(self, dconv: Tensor, filters: Tensor, bias: Tensor, kept: list[Tensor],
                          _segments: Segments | None):
        return super().convolve_backward(dconv, filters, bias, kept, None)


def a_slice(batch: int, channels: int, length: int, taps: int, offsets: Sequence[int] | None = None,
            dtype: torch.dtype = FP32, order: int = 2, given_blocks: Sequence[int] | None = None) -> dict[str, float]:
    """What stands around the convolutions of the last of two slices: y, every gradient, and that at the halo.

    Args:
        given_blocks: the blocks that the kernels get in place of 0, 1, ..., N.
    """
    from hyena_dist.ops.triton import across
    p, dy, *weights = inputs(batch, channels, length, taps, dtype=dtype, order=order)
    halo = torch.randn(batch, order + 1, channels, taps - 1, generator=torch.Generator().manual_seed(5)).to(dtype)
    segments = None if offsets is None else Segments(offsets, batch, 2 * length)
    leaves = [t.double().requires_grad_() for t in (p, halo, *weights)]
    positions = torch.full((batch, length), taps) if segments is None else segments.positions(p.device)[:, length:]
    q = leaves[3].view(order + 1, channels, 1) + sum(
        torch.cat([leaves[1], leaves[0]], 3)[..., taps - 1 - j :][..., :length] * (positions >= j)[:, None, None]
        * leaves[2].view(order + 1, channels, taps)[..., taps - 1 - j, None] for j in range(taps))
    *gates, want = q.unbind(1)
    want = want * gates.pop()
    for h, direct in zip(leaves[4], leaves[5], strict=True):
        want = gates.pop() * causal_conv_reference(want, h, direct)
    gradients = torch.autograd.grad(want, leaves, dy.double())
    if given_blocks is not None:
        p = p[:, given_blocks]
    bands = Bands()
    p, dy, halo, *weights = (bands.around(t) for t in (p, dy, halo, *weights))
    exchange = Slice(halo)
    backend, given = Across(exchange, across), MixWeights(*weights)
    with bands.of_everything_made():
        y, kept = backend.mix(p.flatten(1, 2), given, segments)
        found = backend.mix_backward(p.flatten(1, 2), dy, given, segments, kept)
    names = ("y", "dp", "dhalo", "dweight", "dbias", "dh", "ddirect", "y again")
    pairs = zip((y, p, exchange.dhalo, *found, dy), (want.detach(), *gradients, want.detach()), strict=True)
    errors = {name: relative(a, b) for name, (a, b) in zip(names, pairs, strict=True)}
    return errors | {"outside": 0.0 if bands.whole() else float("inf")}


def declared_rows() -> dict[str, float]:
    """The same of rows with a gate, by one kernel."""
    from hyena_dist.ops.triton import arrived
    u, gate, dy = torch.randn(3, 2, 2, 1021).to(FP16)
    h, direct, plan = torch.randn(2, 1021), torch.randn(2), SmallPlan(32, 32, 32)
    calls = {"convolve": (arrived._convolve, (u, h, direct, gate, dy.clone(), None, [])),
             "convolve_backward": (arrived._convolve_backward,
                                   (dy, u, h, direct, gate, u.clone(), gate.clone(), None, []))}
    errors = {}
    with patch.object(arrived, "plans_on", lambda _u: lambda _size: plan):
        part, = arrived._groups(u, None, [])
        (rows, _), = arrived._rows(u, None, [])
        tables = convolution(arrived._given(u, gate, part, rows), plan).tables()
        for name, (operator, arguments) in calls.items():
            traffic, cost = Traffic(tables), declared_cost(f"hyena::{name}")(*arguments)
            with traffic.counted(), CallCounter(u.device) as counter:
                operator._init_fn(*arguments)
            errors[name] = abs(traffic.bytes / cost.bytes - 1)
            errors[f"{name}'s launches"] = float(abs(traffic.launches + counter.total.launches - cost.launches))
    return errors


def channel_by_channel(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A case in which one channel after the other goes through the passes of a slice that take some at a time."""
    from hyena_dist.ops.triton import across
    with patch.object(across, "GROUP_ELEMENTS", 1):
        return work()


def declared_around(order: int) -> dict[str, float]:
    """Bytes that the kernels around a slice's convolutions move, and launches, against those that are declared: how far
    off. And on meta tensors, where no kernel runs: infinite where shapes are not those of the results."""
    from hyena_dist.ops.triton import across
    p, dy, weight, bias, *_ = inputs(2, 3, 1100, 3, order=order)
    given = p, torch.randn(2, order + 1, 3, 2), weight, bias, None
    short._before_programs(p.shape[-1], 2, p.device)  # which is kept from the first call on
    dinputs = torch.randn(order - 1, *dy.shape)
    calls = {"enter_slice": (across.enter, given), "leave_slice": (across.leave, (*given, dy.clone())),
             "leave_slice_backward": (across.leave_backward, (*given, dy.clone(), dy)),
             "enter_slice_backward": (across.enter_backward, (*given, dinputs))}
    errors = {}
    for name, (operator, arguments) in calls.items():
        traffic, cost = Traffic([]), declared_cost(f"hyena::{name}")(*arguments)
        with traffic.counted(), CallCounter(p.device) as counter:
            result = operator._init_fn(*arguments)
        on_meta = operator(*torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
        pairs = zip(*([r] if isinstance(r, Tensor) else r for r in (result, on_meta)), strict=True)
        errors[name] = abs(traffic.bytes / cost.bytes - 1) if all(a.shape == b.shape for a, b in pairs) else math.inf
        errors[f"{name}'s launches"] = float(abs(traffic.launches + counter.total.launches - cost.launches))
    return errors


def one_border_less() -> dict[str, float]:
    """The control: two segments taken for one."""
    given = inputs(1, 1, 97, 3)
    y = Operator.whole(given[0], *given[2:4], SmallPlan(7, 16, 16)).mix(*given[4:])
    return {"y": relative(y, reference(*given, Segments((0, 40, 97), 1, 97))["y"])}


def swapped_gates() -> dict[str, float]:
    """The control: x0 and x1 in each other's place."""
    given = inputs(1, 1, 97, 3)
    want = reference(*given)
    y = Operator.whole(given[0][:, [1, 0, 2]], *given[2:4], None).mix(*given[4:])
    return {"y": relative(y, want["y"])}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "cufft 97": lambda: by_cufft(2, 2, 97, 3),
    "cufft 1021, 1 tap": lambda: by_cufft(1, 1, 1021, 1),
    "cufft 2500, 4 taps": lambda: by_cufft(1, 2, 2500, 4),
    "cufft bf16": lambda: by_cufft(2, 1, 601, 3, dtype=BF16),
    "cufft fp16": lambda: by_cufft(1, 2, 256, 3, dtype=FP16),
    "one kernel 97": lambda: by_kernels(3, 2, 97, 3, dtype=FP16, plan=SmallPlan(7, 16, 16)),
    "one kernel 97, float32": lambda: by_kernels(2, 1, 97, 3, dtype=FP32, plan=SmallPlan(7, 16, 16)),
    "one kernel 1021, 1 tap": lambda: by_kernels(1, 1, 1021, 1, dtype=FP16),
    "one kernel bf16": lambda: by_kernels(1, 2, 601, 4, dtype=BF16),
    "one kernel 256, five rows": lambda: by_kernels(5, 1, 256, 3, dtype=FP16, plan=SmallPlan(16, 16, 16)),
    "one kernel 251, no taps": lambda: by_kernels(2, 2, 251, 0, dtype=FP32, plan=SmallPlan(16, 16, 16)),
    "three kernels 1000, five rows, no taps": lambda: by_kernels(5, 1, 1000, 0, dtype=FP16,
                                                                 plan=LargePlan(4, 16, 16, 16, 16, 16)),
    "three kernels 601, order 3, no taps": lambda: by_kernels(1, 1, 601, 0, dtype=FP32, order=3,
                                                              plan=LargePlan(3, 16, 16, 16, 16, 16)),
    "three kernels 601": lambda: by_kernels(2, 1, 601, 3, dtype=FP16, plan=LargePlan(3, 16, 16, 16, 16, 16)),
    "three kernels 1021, float32": lambda: by_kernels(1, 2, 1021, 2, dtype=FP32, plan=LargePlan(4, 16, 16, 16, 16, 32)),
    "three kernels, blocks": lambda: by_kernels(1, 2, 1021, 3, dtype=BF16, plan=LargePlan(2, 32, 16, 32, 16, 64)),
    "three kernels 9973": lambda: by_kernels(1, 1, 9973, 3, dtype=FP16),
    "three kernels 9973, float32": lambda: by_kernels(2, 1, 9973, 3, dtype=FP32),
    "operator": whole_operator,
    "operator, recomputed": lambda: whole_operator(residual=True, recompute=True),
    "a slice": lambda: a_slice(2, 3, 1100, 3),
    "a slice of 4 taps": lambda: a_slice(1, 2, 45, 4),
    "a slice of one tap": lambda: a_slice(1, 2, 33, 1),
    "a slice in segments": lambda: a_slice(2, 2, 97, 4, offsets=(0, 95, 98, 99, 150, 194)),
    "a slice of order 3": lambda: a_slice(2, 2, 97, 3, offsets=(0, 95, 98, 99, 150, 194), order=3),
    "a slice of order 3, half precision": lambda: a_slice(1, 2, 1100, 3, dtype=FP16, order=3),
    "a slice of order 4, channel by channel": lambda: channel_by_channel(lambda: a_slice(2, 3, 45, 4, order=4)),
    "control of inner gates": lambda: a_slice(1, 1, 45, 3, order=4, given_blocks=(0, 2, 1, 3, 4)),
    "rows with a gate": lambda: in_order(2, 2, 97, FP32, plan=SmallPlan(7, 16, 16)),
    "rows with a gate, half precision": lambda: in_order(3, 2, 251, FP16, plan=SmallPlan(16, 16, 16)),
    "rows with a gate, three kernels": lambda: in_order(2, 2, 601, FP16, plan=LargePlan(3, 16, 16, 16, 16, 16)),
    "rows with a gate, cufft": lambda: in_order(2, 2, 97, FP32, plan="cufft"),
    "rows with a gate in segments": lambda: in_order(2, 2, 250, FP32, offsets=((0, 3, 130, 250), (0, 124, 250))),
    "bytes, rows with a gate": declared_rows,
    "bytes, around a slice": lambda: declared_around(2),
    "bytes, around a slice of order 3": lambda: declared_around(3),
    "bytes, around a slice of order 4, channel by channel": lambda: channel_by_channel(lambda: declared_around(4)),
    "a slice of half precision": lambda: a_slice(1, 2, 251, 3, dtype=FP16),
    "slices, three kernels": lambda: in_slices(3, 2, 1, 600, FP16, plan=LargePlan(3, 16, 16, 16, 16, 16)),
    "slices, cufft": lambda: in_slices(2, 1, 2, 100, FP32, plan="cufft"),
    "slices": lambda: in_slices(3, 2, 2, 252, FP32),
    "slices of half precision": lambda: in_slices(4, 1, 3, 1200, FP16),
    "slices in segments": lambda: in_slices(2, 2, 2, 250, FP32, offsets=((0, 3, 130, 250), (0, 124, 250))),
    "operator of order 3": lambda: whole_operator(order=3, recompute=True),
    "operator in segments": lambda: whole_operator(segments=((0, 20, 53), (0, 1, 2, 53))),
    "control of segments": one_border_less,
    "control": swapped_gates,
    "control of addresses": triton_bounds.controls,
    "control of tables": swapped_twiddles,
    "training": training,
    "registration": registration,
    "bytes, one kernel": lambda: declared(2, 2, 1021, 1, dtype=FP16, plan=SmallPlan(32, 32, 32)),
    "bytes, one kernel, float32": lambda: declared(3, 1, 1021, 1, dtype=FP32, plan=SmallPlan(32, 32, 32)),
    "bytes, three kernels": lambda: declared(2, 1, 1021, 1, dtype=BF16, plan=LargePlan(4, 16, 16, 16, 16, 64)),
    "bytes, three kernels, float32": lambda: declared(1, 1, 1021, 1, dtype=FP32, plan=LargePlan(4, 16, 16, 16, 16, 64)),
    "order 3": lambda: by_kernels(2, 1, 97, 3, dtype=FP32, plan=SmallPlan(7, 16, 16), order=3),
    "order 3, three kernels": lambda: by_kernels(2, 1, 601, 2, dtype=FP16, plan=LargePlan(3, 16, 16, 16, 16, 16),
                                                 order=3),
    "order 3, cufft": lambda: compare(inputs(1, 2, 97, 3, order=3), None),
    "kept spectra": lambda: kept_spectra(1, 1, 601, 3),
    "kept spectra, order 3": lambda: kept_spectra(2, 2, 601, 3, order=3),
    "registration of spectra": registration_of_spectra,
    "registration over context ranks": registration_over_ranks,
    "control of spectra": lambda: kept_spectra(1, 1, 601, 1, spoilt=True),
    "bytes, order 3": lambda: declared(2, 2, 1021, 1, dtype=FP16, plan=SmallPlan(32, 32, 32), order=3),
    "segments": lambda: in_segments(2, 2, 211, 3, offsets=((0, 1, 3, 97, 211), (0, 60, 120, 211)), dtype=FP32,
                                    plan=SmallPlan(8, 16, 16)),
    "segments, order 3": lambda: in_segments(1, 2, 151, 4, offsets=((0, 51, 53, 151),), dtype=FP32,
                                             plan=SmallPlan(7, 16, 16), order=3),
    "segments, three kernels": lambda: in_segments(2, 1, 601, 3, offsets=((0, 601), (0, 50, 330, 601)), dtype=FP16,
                                                   plan=LargePlan(3, 16, 16, 16, 16, 16)),
    "segments, cufft": lambda: in_segments(1, 2, 97, 3, offsets=((0, 40, 97),), dtype=FP32, plan=None),
    "golden tiny": lambda: golden_numbers("tiny"),
    "golden wide": lambda: golden_numbers("wide"),
    "bf16, all recomputed": lambda: in_half_precision("full"),
    "fp16, some recomputed": lambda: in_half_precision("selective", "fp16"),
    "far apart": far_apart,
    "one token": lambda: by_kernels(2, 1, 1, 3, dtype=FP32),
    "three tokens": lambda: by_kernels(1, 2, 3, 5, dtype=FP16),
} | triton_sizes.CASES | {f"{what}, {name}": lambda what=what, dtype=dtype, plan=plan: hard(what, dtype, plan)
     for what in HARD
     for name, dtype, plan in (("one kernel", BF16, SmallPlan(16, 16, 16)),
                               ("one kernel, float32", FP32, SmallPlan(16, 16, 16)),
                               ("three kernels", BF16, LargePlan(1, 16, 16, 16, 16, 16)),
                               ("three kernels, float32", FP32, LargePlan(1, 16, 16, 16, 16, 16)))}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:]}))
