"""The kernels around the operator in Triton's interpreter against float64, as in `tests.triton_cases`:
`python -m tests.triton_around NAME ...` prints {name: {what: error}} as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.counting import CallCounter
from hyena_dist.ops import chunking
from hyena_dist.ops.costs import declared_cost
from tests.triton_cases import BF16, FP16, FP32, Bands, relative
from tests.triton_traffic import Traffic

# Imported after `triton_cases`, which asks for the interpreter.
from hyena_dist.ops import linear as torch_linear, mlp as torch_mlp  # isort: skip
from hyena_dist.ops.linear import linear, to_channels  # isort: skip
from hyena_dist.ops.norm import NormWeights, layer_norm  # isort: skip
from hyena_dist.ops import implicit_filter as torch_filter  # isort: skip
from hyena_dist.ops.triton import filter as filter_kernels, gelu as gelu_kernels, norm as norm_kernels  # isort: skip
from hyena_dist.ops.triton import mlp as mlp_kernels, project as project_kernels  # isort: skip
from hyena_dist.ops.hyena import HyenaWeights, hyena  # isort: skip


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dy.double())


def norm(tokens: int, batch: int, channels: int, dtype: torch.dtype, *, residual: bool, product: torch.dtype = FP32,
         padding: int = 0, change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
    """x and the residual of `dtype`, [tokens, batch, channels], read row by row; of the product's dtype the rest."""
    torch.manual_seed(channels)
    bands = Bands()
    x, added = (bands.around(t) for t in (3 + 2 * normal(tokens, batch, channels, dtype=dtype),
                                          normal(tokens, batch, channels, dtype=dtype)))
    weight, bias = (bands.around(normal(channels)) for _ in range(2))
    dy = bands.around(normal(batch, tokens, channels, dtype=product))
    leaves = [t.double().requires_grad_() for t in (x.transpose(0, 1), weight, bias)]
    want = torch.nn.functional.layer_norm(leaves[0], (channels,), *leaves[1:], 1e-5)
    dx, dweight, dbias = gradients(want, dy, *leaves)
    dx = dx + added.transpose(0, 1).double() if residual else dx
    found_dx = bands.around(torch.full_like(x, float("nan"))).transpose(0, 1)
    with bands.of_everything_made():
        wide = norm_kernels.forward(change(x.transpose(0, 1)), weight, bias, 1e-5, product, padding)
        sums = norm_kernels.backward(x.transpose(0, 1), dy, weight, 1e-5, found_dx,
                                     added.transpose(0, 1) if residual else None)
    y, columns = wide.split([channels, padding], -1)
    one_and_zeros = (torch.arange(padding) == 0).to(product).expand(columns.shape)
    return {"y": relative(y, want.detach()), "dx": relative(found_dx, dx), "dweight": relative(sums[0], dweight),
            "dbias": relative(sums[1], dbias), "columns": 0.0 if torch.equal(columns, one_and_zeros) else float("inf"),
            "outside": 0.0 if bands.whole() else float("inf")}


def gelu(tokens: int, width: int, dtype: torch.dtype, scale: float = 2.0,
         approximate: str = "tanh") -> dict[str, float]:
    """Both directions. The control: GELU that is not by tanh differs by 3e-4."""
    torch.manual_seed(width)
    bands = Bands()
    h, da = (bands.around(t.to(dtype)) for t in (normal(tokens, width) * scale, normal(tokens, width)))
    leaf = h.double().requires_grad_()
    want = torch.nn.functional.gelu(leaf, approximate=approximate)
    dh, = gradients(want, da, leaf)
    with bands.of_everything_made():
        first, a = (bands.around(torch.full_like(h, float("nan"))) for _ in range(2))
        gelu_kernels.forward(h, first)
        dbias = gelu_kernels.backward(h, da, a)
    return {"y": relative(first, want.detach()), "a": relative(a, want.detach()), "dh": relative(da, dh),
            "dbias": relative(dbias, dh.sum(0)), "outside": 0.0 if bands.whole() else float("inf")}


def one_kernel(tokens: int, width: int, inner: int, dtype: torch.dtype, *, stream: torch.dtype | None = None,
               normed: bool = True, bias: bool = True, scale: float = 1.0,
               change: Callable[[Tensor], Tensor] = lambda w: w) -> dict[str, float]:
    """The MLP in one kernel, both directions, with the residual where x is of a `stream` of some dtype, which y is then
    of. The control has another second weight."""
    torch.manual_seed(width + inner)
    bands = Bands()
    first, first_bias, second, second_bias = (bands.around((normal(*shape) * factor).to(dtype)) for *shape, factor in (
        (inner, width, scale * width**-0.5), (inner, 0.3), (width, inner, inner**-0.5), (width, 1.0)))
    weight, shift = (bands.around(t) for t in (1 + 0.2 * normal(width), normal(width)))
    x, dy = (bands.around(t.to(dtype).to(stream or dtype)) for t in (2 * normal(tokens, width), normal(tokens, width)))
    n, left = x.double(), first_bias.double().requires_grad_()
    if normed:
        n = torch.nn.functional.layer_norm(n, (width,), weight.double(), shift.double(), 1e-5)
    h = torch.nn.functional.linear(n.requires_grad_(), first.double(), left)
    a = torch.nn.functional.gelu(h, approximate="tanh")
    y = torch.nn.functional.linear(a, change(second).double(), second_bias.double() if bias else None)
    y = y if stream is None else y + x.double()
    dn, dh, dbias = gradients(y, dy, n, h, left)
    found = {name: bands.around(torch.full((tokens, columns), float("nan"), dtype=kind)) for name, columns, kind in (
        ("y", width, stream or dtype), ("g", width, dtype), ("a", inner, dtype), ("dh", inner, dtype),
        ("dn", width, FP32))}
    norm, low = (weight, shift) if normed else (None, None), dy.dtype == dtype
    rounded = bands.around(n.detach().to(dtype))
    with bands.of_everything_made():
        mlp_kernels.forward(x, *norm, 1e-5, first, first_bias, second, second_bias if bias else None,
                            stream is not None, found["y"])
        sums = mlp_kernels.backward(rounded, dy, first, first_bias, second, found["a"], found["dh"], found["dn"],
                                    None if low else found["g"])
    wanted = {"y": y, "a": a, "dh": dh, "dn": dn, "g": dy}
    pairs = {name: (found[name], want.detach()) for name, want in wanted.items() if name != "g" or not low}
    pairs |= {"dfirst_bias": (sums[:inner], dbias), "dsecond_bias": (sums[inner:], dy.double().sum(0))}
    return {name: relative(*pair) for name, pair in pairs.items()} | {"outside": 0.0 if bands.whole() else float("inf")}


def last_product(tokens: int, batch: int, inner: int, width: int, dtype: torch.dtype, *,
                 residual: torch.dtype | None = FP32, bias: bool = True,
                 change: Callable[[Tensor], Tensor] = lambda w: w) -> dict[str, float]:
    """The operator's last product, both directions. The control has another weight."""
    torch.manual_seed(width + inner)
    bands = Bands()
    kind, shape = torch.promote_types(dtype, residual or dtype), (tokens, batch, width)
    y, dy = (bands.around(normal(batch, inner, tokens, dtype=dtype)) for _ in range(2))
    weight = bands.around((normal(width, inner) * inner**-0.5).to(dtype))
    added, dout = (bands.around(normal(*shape, dtype=each)) for each in (residual or FP32, kind))
    last = bands.around(normal(width)) if bias else None
    want = torch.einsum("bcl,dc->lbd", y.double(), change(weight).double())
    want += (0 if last is None else last.double()) + (0 if residual is None else added.double())
    out = bands.around(torch.full(shape, float("nan"), dtype=kind))
    g = None if kind == dtype else bands.around(torch.full(shape, float("nan"), dtype=dtype))
    dy.fill_(float("nan"))
    with bands.of_everything_made():
        project_kernels.forward(y, weight, last, None if residual is None else added, out)
        sums = project_kernels.backward(dout, weight, dy, g)
    pairs = {"y": (out, want), "dy": (dy, torch.einsum("lbd,dc->bcl", dout.double(), change(weight).double())),
             "g": (dout if g is None else g, dout), "dbias": (sums, dout.double().sum((0, 1)))}
    return {name: relative(*pair) for name, pair in pairs.items()} | {"outside": 0.0 if bands.whole() else float("inf")}


def far_product(*sizes: int) -> dict[str, float]:
    """Tensors of more than 2^31 elements, [batch, channels, tokens] and [tokens, batch, width], without their memory:
    addresses outside them are refused."""
    batch, inner, tokens, width = sizes
    y, weight = (torch.empty(*shape, dtype=BF16, device="meta") for shape in ((batch, inner, tokens), (width, inner)))
    out, g = (torch.empty(tokens, batch, width, dtype=dtype, device="meta") for dtype in (FP32, BF16))
    assert y.numel() > 2**31
    assert out.numel() > 2**31
    project_kernels.forward._init_fn(y, weight, weight[:, 0], out.clone(), out)
    project_kernels.backward._init_fn(out, weight, y, g)
    return {"refused": 0.0}


def whole(function: Callable[..., Tensor], *shapes: tuple[int, ...], product: torch.dtype = FP32,
          chunk: int = 2**17) -> dict[str, float]:
    """A function of tensors and a backend, by kernels and by torch's operations in float64: y and every gradient.
    `product`: of its products, by autocast; `chunk`: elements of a chunk, about."""
    results = []
    for dtype, backend in ((FP32, "triton"), (torch.float64, "torch")):
        torch.manual_seed(1)
        leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]
        with patch.multiple(chunking, CHUNK_ELEMENTS=chunk, LEAST_TOKENS=3):
            with torch.autocast("cpu", product, enabled=backend == "triton" and product != FP32):
                y = function(backend, *leaves)
            results.append([y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(dtype))])
    return {str(i): relative(a.detach(), b.detach()) for i, (a, b) in enumerate(zip(*results, strict=True))}


def no_token() -> dict[str, float]:
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((0, 2, 12), (48, 12), (48,), (12, 48), (12,), (12,),
                                                                    (12,))]
    with torch.autocast("cpu", FP16):
        whole_mlp("triton", *leaves).sum().backward()
    return {"left": float(sum(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves))}


def whole_mlp(backend: str, x: Tensor, *tensors: Tensor) -> Tensor:
    return torch_mlp.mlp(x, torch_mlp.MLPWeights(*tensors[:4]), NormWeights(*tensors[4:], 1e-5, backend), residual=True,
                         backend=backend)


def whole_operator(backend: str, x: Tensor, *tensors: Tensor) -> Tensor:
    return hyena(x, HyenaWeights(*tensors), residual=True, backend=backend)


def whole_linear(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return linear(x, weight, bias, NormWeights(*norm, 1e-5, backend))


def whole_channels(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return to_channels(x, weight, bias, NormWeights(*norm, 1e-5, backend))


def with_bias_columns(tokens: int, batch: int, channels: int, dtype: torch.dtype, *, chunk: int = 2**17,
                      function: str = "with_bias", change: Any = lambda right: right) -> dict[str, float]:
    """`to_channels` in half precision, in chunks of about `chunk` elements, against float64: y and every gradient; and
    whether it took the way on which the bias is a column of the weight. A control changes a function of
    `ops.linear`."""
    shapes = (tokens, batch, channels), (5, channels), (5,), (channels,), (channels,)
    torch.manual_seed(channels)
    exact = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    dy = torch.randn(batch, 5, tokens, dtype=torch.float64)
    want = whole_channels("torch", *exact)
    leaves = [t.detach().float().requires_grad_() for t in exact]
    with (patch.multiple(chunking, CHUNK_ELEMENTS=chunk, LEAST_TOKENS=3), CallCounter(torch.device("cpu")) as counter,
          patch.object(torch_linear, function, change(getattr(torch_linear, function)))):
        with torch.autocast("cpu", dtype):
            y = whole_channels("triton", *leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(dtype))
    pairs = zip((y.detach(), *grads), (want.detach(), *gradients(want, dy, *exact)), strict=True)
    passes = [name for _, name in counter.operators if name.startswith(("aten.add.out", "aten.sum"))]
    return {str(i): relative(a, b) for i, (a, b) in enumerate(pairs)} | {"passes": float(len(passes))}


def implicit(lags: int, rows: int, width: int, emb: int, layers: int, frequency: float = 1.0, *,
             start: int = 0, beside_torch: bool = False, shift: float = 0.05) -> dict[str, float]:
    """Both directions on the float32 features; `beside_torch` in units of the error of torch's own operations in
    float32. The control has another window."""
    torch.manual_seed(width + rows)
    bands = Bands()
    shape = torch_filter.FilterShape(start + lags, emb, 0.05)
    features = torch_filter.positional_features(shape, slice(start, start + lags), FP32, torch.device("cpu"))
    inputs = [emb, *[width] * (layers - 1)]
    pairs = [(normal(width, n) * n**-0.5, 0.3 * normal(width)) for n in inputs]
    weights = [bands.around(t) for pair in pairs for t in pair]
    freq, last = bands.around(frequency * (1 + 0.1 * normal(width))), bands.around(normal(rows, width) * width**-0.5)
    decay = bands.around(torch.linspace(-3, -15, rows))
    dh = bands.around(1e-4 * normal(rows, lags))

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (freq, last, *weights)]
        a = z = features.to(dtype)
        for weight, bias in zip(leaves[2::2], leaves[3::2], strict=True):
            a = torch.sin(leaves[0] * torch.nn.functional.linear(a, weight, bias))
        h = leaves[1].mm(a.t()) * (torch.exp(decay.to(dtype)[:, None] * z[:, 0]) + 0.05)
        return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(dtype))]

    want = plain(torch.float64)
    features = bands.around(features)
    kept, filter_kernels.CHUNK = filter_kernels.CHUNK, 192
    with bands.of_everything_made():
        found = [filter_kernels.forward(features, weights, freq, last, decay, shift),
                 *filter_kernels.backward(features, dh, weights, freq, last, decay, shift)]
    filter_kernels.CHUNK = kept
    unit = [relative(a, b) for a, b in zip(plain(FP32), want, strict=True)] if beside_torch else [1.0] * len(want)
    errors = {str(i): relative(a, b) / u for i, (a, b, u) in enumerate(zip(found, want, unit, strict=True))}
    return errors | {"outside": 0.0 if bands.whole() else float("inf")}


def declared() -> dict[str, float]:
    """What kernels move, weights aside, and what they declare: the relative difference. And on meta tensors, where no
    kernel runs: infinite where shapes are not those of the results."""
    x, residual, dx = normal(300, 96), normal(300, 96), normal(300, 96)
    weight, h = normal(96), normal(50, 130).to(BF16)
    features, dh, freq, last, decay = normal(200, 5), normal(70, 200), normal(16), normal(70, 16), -normal(70).abs()
    trunk = [normal(16, 5), normal(16), normal(16, 16), normal(16), normal(16, 16), normal(16)]
    stacks = {2: torch.stack(trunk[2::2]), 3: torch.stack(trunk[1::2])}
    of_filter = trunk, freq, last, decay, 0.05
    low, first, second, inner = (normal(*shape).to(FP16) for shape in ((150, 40), (70, 40), (40, 70), (150, 70)))
    wide, scales = normal(150, 40), (normal(40), normal(40))
    of_mlp = wide, *scales, 1e-5
    across, stream = normal(2, 70, 75).to(FP16), normal(75, 2, 40)
    calls = {"project": (project_kernels.forward, (across, second, second[:, 0].contiguous(), stream, stream.clone())),
             "project, no residual": (project_kernels.forward, (across, second, None, None, stream.to(FP16))),
             "project_backward": (project_kernels.backward, (stream, second, across.clone(), stream.to(FP16))),
             "mlp": (mlp_kernels.forward, (*of_mlp, first, first[:, 0].contiguous(), second, second[:, 0].contiguous(),
                                           True, wide.clone())),
             "mlp_backward": (mlp_kernels.backward, (low, wide, first, first[:, 0].contiguous(), second, inner,
                                                     inner.clone(), low.clone(), low.clone())),
             "norm": (norm_kernels.forward, (x, weight, weight, 1e-5, BF16)),
             "norm, padded": (norm_kernels.forward, (x, weight, weight, 1e-5, BF16, 8)),
             "norm_backward": (norm_kernels.backward, (x, x.to(BF16), weight, 1e-5, dx, residual)),
             "gelu": (gelu_kernels.forward, (h, h.clone())),
             "gelu_backward": (gelu_kernels.backward, (h, h.clone(), h.clone())),
             "filter": (filter_kernels.forward, (features, *of_filter)),
             "filter_backward": (filter_kernels.backward, (features, dh, *of_filter))}
    errors = {}
    for name, (function, arguments) in calls.items():
        weights = [t for t in arguments if isinstance(t, Tensor) and t.shape in ((40,), (70,), (70, 40), (40, 70))]
        traffic = Traffic([weight, freq, last, decay, *trunk, *stacks.values(), *weights])
        with traffic.counted(), patch.object(torch, "stack", lambda parts: stacks[len(parts)]):
            result = function(*arguments)
        errors[name] = abs(traffic.bytes / declared_cost(f"hyena::{name.partition(',')[0]}")(*arguments).bytes - 1)
        on_meta = function(*torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
        pairs = [] if result is None else zip(*([r] if isinstance(r, Tensor) else r for r in (result, on_meta)),
                                              strict=True)
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            errors[name] = float("inf")
    return errors


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "norm 96": lambda: norm(37, 1, 96, FP32, residual=True),
    "norm 128, three rows": lambda: norm(13, 3, 128, FP32, residual=False),
    "norm 256 bf16": lambda: norm(11, 2, 256, FP32, residual=True, product=BF16),
    "norm 256, half": lambda: norm(1, 5, 256, FP16, residual=True, product=FP16),
    "norm 768": lambda: norm(5, 1, 768, FP32, residual=False),
    "norm 7, one token": lambda: norm(1, 1, 7, FP32, residual=True),
    "norm 96, padded": lambda: norm(37, 1, 96, FP32, residual=True, product=FP16, padding=8),
    "norm 256 bf16, padded, three rows": lambda: norm(5, 3, 256, FP16, residual=False, product=BF16, padding=8),
    "norm 8, padded, one token": lambda: norm(1, 1, 8, FP32, residual=True, product=FP16, padding=8),
    "norm 1100": lambda: norm(3, 2, 1100, FP32, residual=True),
    "gelu": lambda: gelu(37, 130, FP32),
    "gelu, large": lambda: gelu(3, 96, FP32, scale=100.0),
    "gelu bf16": lambda: gelu(19, 384, BF16),
    "gelu fp16": lambda: gelu(1, 256, FP16),
    "mlp": lambda: whole(whole_mlp, (7, 2, 12), (48, 12), (48,), (12, 48), (12,), (12,), (12,)),
    "mlp fp16": lambda: whole(whole_mlp, (7, 2, 12), (48, 12), (48,), (12, 48), (12,), (12,), (12,), product=FP16),
    "mlp fp16, chunks": lambda: whole(whole_mlp, (7, 2, 12), (48, 12), (48,), (12, 48), (12,), (12,), (12,),
                                      product=FP16, chunk=60),
    "mlp fp16, as wide inside": lambda: whole(whole_mlp, (5, 2, 12), (12, 12), (12,), (12, 12), (12,), (12,), (12,),
                                              product=FP16),
    "mlp fp16, no token": no_token,
    "one kernel": lambda: one_kernel(150, 40, 70, FP16, stream=FP32),
    "one kernel, large": lambda: one_kernel(7, 16, 64, FP16, scale=30.0, bias=False, normed=False),
    "one kernel bf16": lambda: one_kernel(130, 128, 96, BF16, stream=FP32),
    "one kernel, 256": lambda: one_kernel(9, 256, 96, FP16),
    "one kernel, one token": lambda: one_kernel(1, 7, 5, FP16, stream=FP16, normed=False),
    "one kernel, control": lambda: one_kernel(9, 16, 64, FP16, change=lambda w: w.flip(1)),
    "last product": lambda: last_product(75, 3, 70, 40, FP16),
    "last product, 256": lambda: last_product(9, 1, 33, 256, FP16, bias=False),
    "last product bf16": lambda: last_product(64, 2, 96, 128, BF16, residual=BF16),
    "last product of one": lambda: last_product(1, 1, 1, 1, FP16, residual=None),
    "last product, neither": lambda: last_product(130, 1, 16, 7, FP16, residual=None, bias=False),
    "last product, far": lambda: far_product(9, 256, 2**20, 256),
    "last product, many rows": lambda: far_product(2**17 + 3, 96, 200, 96),
    "last product, control": lambda: last_product(9, 2, 64, 16, FP16, change=lambda w: w.flip(1)),
    "operator fp16": lambda: whole(whole_operator, (20, 2, 6), (12, 6), (12,), (12, 3), (12,), (1, 4, 20), (1, 4),
                                   (6, 4), (6,), product=FP16),
    "linear": lambda: whole(whole_linear, (7, 3, 12), (5, 12), (5,), (12,), (12,)),
    "to channels": lambda: whole(whole_channels, (7, 3, 12), (5, 12), (5,), (12,), (12,)),
    "to channels, one row": lambda: whole(whole_channels, (9, 1, 12), (5, 12), (5,), (12,), (12,)),
    "bias as a column": lambda: with_bias_columns(19, 3, 16, FP16),
    "bias as a column, bf16, chunks": lambda: with_bias_columns(20, 3, 24, BF16, chunk=60),
    "bias as a column, chunks of one row": lambda: with_bias_columns(20, 1, 16, FP16, chunk=30),
    "another channel's bias, control": lambda: with_bias_columns(
        19, 3, 16, FP16, change=lambda right: lambda weight, bias: right(weight, bias.roll(1))),
    "the last chunk's gradient, control": lambda: with_bias_columns(
        20, 1, 16, FP16, chunk=30, function="accumulate_product",
        change=lambda right: lambda _total, *product: right(None, *product)),
    "layer norm": lambda: whole(lambda backend, x, *w: layer_norm(x, NormWeights(*w, 1e-5, backend)), (7, 3, 12), (12,),
                                (12,)),
    "declared": declared,
    "filter": lambda: implicit(301, 20, 64, 5, 3, start=1000),
    "filter of width 16": lambda: implicit(67, 1, 16, 3, 2),
    "filter of width 96": lambda: implicit(33, 65, 96, 9, 2),
    "filter of one layer": lambda: implicit(5, 3, 48, 5, 1),
    "filter of frequency 10": lambda: implicit(131, 70, 64, 5, 3, 10.0, beside_torch=True),
    "filter, control": lambda: implicit(33, 5, 32, 5, 2, shift=0.5),
    "gelu, control": lambda: gelu(37, 130, FP32, approximate="none"),
    "norm, control": lambda: norm(5, 2, 96, FP32, residual=False, change=lambda x: x.flip(0)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:]}))
