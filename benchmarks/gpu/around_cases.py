"""What the check of the kernels around the operator runs, and its references.

    python -m benchmarks.gpu.around_cases INDEX PROCESSES

checks this process' part of them. An error is in units of what is allowed: right is less than 1.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.kernel_cases import BF16, ERRORS, FP16, FP32, relative
from benchmarks.gpu.task import device
from hyena_dist.ops.implicit_filter import FilterShape, positional_features
from hyena_dist.ops.linear import linear_reference, to_channels
from hyena_dist.ops.norm import NormWeights
from hyena_dist.ops.triton import filter as filters
from hyena_dist.ops.triton import gelu, mlp, norm, project

ROUNDING = {BF16: 3e-3, FP16: 5e-4, FP32: 2e-6}
"""2-norms: bfloat16 makes 1.7e-3."""
SUMS = 2e-5
"""Of sums over all tokens, of which the most part cancels."""
SEED = 5


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, device=device()).to(dtype)


def norm_inputs(tokens: int, batch: int, channels: int, dtype: torch.dtype,
                product: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x and the residual's gradient [batch, tokens, channels], which lie as [tokens, batch, channels]; weight, bias;
    the gradient at the result."""
    torch.manual_seed(SEED)
    x, residual = (normal(tokens, batch, channels, dtype=dtype).transpose(0, 1) for _ in range(2))
    return x.add_(0.5), residual, 1 + 0.1 * normal(channels), normal(channels), normal(batch, tokens, channels,
                                                                                      dtype=product)


def check_norm(*sizes: int, dtype: torch.dtype = FP32, product: torch.dtype = BF16,
               padding: int = 0) -> dict[str, float]:
    x, residual, weight, bias, dy = norm_inputs(*sizes, dtype=dtype, product=product)
    y, dx = norm.forward(x, weight, bias, 1e-5, product, padding), torch.empty_like(x)
    y, columns = y.split([x.shape[-1], padding], -1)
    one_and_zeros = (torch.arange(padding, device=x.device) == 0).to(product)
    dweight, dbias = norm.backward(x, dy, weight, 1e-5, dx, residual)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = torch.nn.functional.layer_norm(leaves[0], leaves[0].shape[-1:], *leaves[1:], 1e-5)
    grads = torch.autograd.grad(want, leaves, dy.double())
    return {"y": relative(y, want.detach()) / ROUNDING[product],
            "dx": relative(dx, grads[0] + residual) / ROUNDING[dtype],
            "dweight": relative(dweight, grads[1]) / SUMS, "dbias": relative(dbias, grads[2]) / SUMS,
            "columns": float(not torch.equal(columns, one_and_zeros.expand(columns.shape)))}


def check_projection(tokens: int, batch: int, channels: int, dtype: torch.dtype = BF16) -> dict[str, float]:
    """The norm, and the product after it in half precision, three times as wide, with its bias as a column."""
    torch.manual_seed(SEED)
    wide = 3 * channels
    leaves = [t.requires_grad_() for t in (normal(tokens, batch, channels), normal(wide, channels).mul_(channels**-0.5),
                                           normal(wide), 1 + 0.1 * normal(channels), normal(channels))]
    dy = normal(batch, wide, tokens, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = linear_reference(*exact[:3], NormWeights(*exact[3:], 1e-5)).permute(1, 2, 0)
    grads = torch.autograd.grad(want, exact, dy.double())
    with torch.autocast(device().type, dtype):
        y = to_channels(*leaves[:3], NormWeights(*leaves[3:], 1e-5, "triton"))
    found = torch.autograd.grad(y, leaves, dy)
    names = ("y", "dx", "dweight", "dbias", "dscale", "dshift")
    return {name: relative(a.detach(), b.detach()) / (2 * ROUNDING[dtype])
            for name, a, b in zip(names, (y, *found), (want, *grads), strict=True)}


def check_far_norm() -> dict[str, float]:
    """More than 2^31 elements: the last rows."""
    torch.manual_seed(SEED)
    x, last = torch.randn(2**23 + 5, 256, device=device(), dtype=BF16), slice(-1000, None)
    weight, bias = normal(256), normal(256)
    dx = norm.forward(x, weight, bias, 1e-5, BF16)
    y = dx[last].clone()
    norm.backward(x, x, weight, 1e-5, dx, x)
    leaf = x[last].double().requires_grad_()
    want = torch.nn.functional.layer_norm(leaf, (256,), weight.double(), bias.double(), 1e-5)
    dleaf, = torch.autograd.grad(want, leaf, leaf.detach())
    return {"y": relative(y, want.detach()) / ROUNDING[BF16],
            "dx": relative(dx[last], dleaf + leaf.detach()) / ROUNDING[BF16]}


def check_gelu(tokens: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(SEED)
    h, da = 2 * normal(tokens, width, dtype=dtype), normal(tokens, width, dtype=dtype)
    leaf = h.double().requires_grad_()
    want = torch.nn.functional.gelu(leaf, approximate="tanh")
    dh, = torch.autograd.grad(want, leaf, da.double())
    y, a = torch.empty_like(h), torch.empty_like(h)
    gelu.forward(h, y)
    dbias = gelu.backward(h, da, a)
    want = want.detach()
    return {"y": relative(y, want) / ROUNDING[dtype], "a": relative(a, want) / ROUNDING[dtype],
            "dh": relative(da, dh) / ROUNDING[dtype], "dbias": relative(dbias, dh.sum(0)) / SUMS}


def check_far_gelu() -> dict[str, float]:
    """More than 2^31 elements: the last rows."""
    torch.manual_seed(SEED)
    h, last = torch.randn(2**21 + 3, 1024, device=device(), dtype=BF16), slice(-100, None)
    da, a = torch.ones_like(h), torch.empty_like(h)
    leaf = h[last].double().requires_grad_()
    want = torch.nn.functional.gelu(leaf, approximate="tanh")
    dh, = torch.autograd.grad(want.sum(), leaf)
    gelu.forward(h, a)
    y = a[last].clone()
    gelu.backward(h, da, a)
    return {name: relative(found, right) / ROUNDING[BF16]
            for name, found, right in (("y", y, want.detach()), ("a", a[last], want.detach()), ("dh", da[last], dh))}


def mlp_inputs(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """In float32 x, the norm's weight and bias, and the gradient at the result; the weights and biases."""
    torch.manual_seed(SEED)
    inner = 4 * width
    factors = {(inner, width): width**-0.5, (inner,): 0.3, (width, inner): inner**-0.5, (width,): 1.0}
    return [2 * normal(tokens, width), 1 + 0.1 * normal(width), normal(width),
            normal(tokens, width, dtype=dtype).float(),
            *((normal(*shape) * size).to(dtype) for shape, size in factors.items())]


def run_mlp(x: Tensor, weight: Tensor, shift: Tensor, dy: Tensor, first: Tensor, first_bias: Tensor, second: Tensor,
            bias: Tensor) -> dict[str, Tensor]:
    """What both kernels give, and what the second reads: the norm, rounded."""
    n = torch.nn.functional.layer_norm(x, x.shape[1:], weight, shift, 1e-5).to(first.dtype)
    y, dn, g = torch.empty_like(x), torch.empty_like(n), torch.empty_like(n)
    a, dh = (torch.empty(len(n), len(first), dtype=n.dtype, device=n.device) for _ in range(2))
    mlp.forward(x, weight, shift, 1e-5, first, first_bias, second, bias, True, y)
    dfirst_bias, dbias = mlp.backward(n, dy, first, first_bias, second, a, dh, dn, g).split(first.shape)
    return {"n": n, "y": y, "a": a, "dh": dh, "dn": dn, "g": g, "dfirst_bias": dfirst_bias, "dbias": dbias}


def check_mlp(tokens: int, width: int, dtype: torch.dtype, *, last: int | None = None) -> dict[str, float]:
    """last: only so many rows are compared, and no sums."""
    x, *norm, dy, first, first_bias, second, bias = mlp_inputs(tokens, width, dtype)
    found = run_mlp(x, *norm, dy, first, first_bias, second, bias)
    rows = slice(None) if last is None else slice(-last, None)
    n, left, dy = (t.double() for t in (found.pop("n")[rows], first_bias, dy[rows]))
    h = torch.nn.functional.linear(n.requires_grad_(), first.double(), left.requires_grad_())
    a = torch.nn.functional.gelu(h, approximate="tanh")
    y = torch.nn.functional.linear(a, second.double(), bias.double()) + x[rows].double()
    dn, dh, dleft = torch.autograd.grad(y, (n, h, left), dy)
    want = {"y": y.detach(), "a": a.detach(), "dh": dh, "dn": dn, "g": dy}
    errors = {name: relative(found[name][rows], each) / ROUNDING[dtype] for name, each in want.items()}
    sums = {} if last is not None else {"dfirst_bias": dleft, "dbias": dy.sum(0)}
    return errors | {name: relative(found[name], each) / SUMS for name, each in sums.items()}


def product_inputs(tokens: int, batch: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the operator's last product: y, the weight, the bias, and in float32 the residual and the gradient at the
    result, which half precision holds."""
    torch.manual_seed(SEED)
    stream = tokens, batch, width
    return [normal(batch, width, tokens, dtype=dtype), (normal(width, width) * width**-0.5).to(dtype), normal(width),
            normal(*stream), normal(*stream, dtype=dtype).float()]


def run_product(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """What both kernels give."""
    out, dy, g = torch.empty_like(residual), torch.empty_like(y), torch.empty_like(dout, dtype=y.dtype)
    project.forward(y, weight, bias, residual, out)
    return {"dbias": project.backward(dout, weight, dy, g), "out": out, "dy": dy, "g": g}


def check_product(tokens: int, batch: int, width: int, dtype: torch.dtype = BF16) -> dict[str, float]:
    given = product_inputs(tokens, batch, width, dtype)
    found = run_product(*given)
    y, weight, bias, residual, dout = (t.double() for t in given)
    want = {"out": torch.einsum("bcl,dc->lbd", y, weight).add_(bias).add_(residual),
            "dy": torch.einsum("lbd,dc->bcl", dout, weight), "g": dout}
    limits = {"out": ROUNDING[FP32], "dy": ROUNDING[dtype], "g": ROUNDING[dtype]}
    return ({name: relative(found[name], each) / limits[name] for name, each in want.items()}
            | {"dbias": relative(found["dbias"], dout.sum((0, 1))) / SUMS})


def check_far_product() -> dict[str, float]:
    """More than 2^31 elements: the last tokens. The gradient at the result is the result, that at y is written over
    y."""
    torch.manual_seed(SEED)
    y, last = torch.randn(1, 256, 2**23 + 5, device=device(), dtype=BF16), slice(-1000, None)
    weight, out = (normal(256, 256) / 16).to(BF16), torch.empty(y.shape[2], 1, 256, dtype=BF16, device=y.device)
    want = torch.einsum("cl,dc->ld", y[0, :, last].double(), weight.double())
    project.forward(y, weight, None, None, out)
    project.backward(out, weight, y, None)
    dy = torch.einsum("ld,dc->cl", out[last, 0].double(), weight.double())
    return {"out": relative(out[last, 0], want) / ROUNDING[BF16], "dy": relative(y[0, :, last], dy) / ROUNDING[BF16]}


def filter_inputs(lags: int, rows: int, width: int, emb: int, layers: int,
                  frequency: float) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """features, the gradient at the filter, the trunk's weights, freq, last, decay."""
    torch.manual_seed(SEED)
    features = positional_features(FilterShape(lags, emb, 0.05), slice(0, lags), FP32, device())
    weights = []
    for inputs in (emb, *[width] * (layers - 1)):
        weights += [normal(width, inputs) * inputs**-0.5, 0.3 * normal(width)]
    return (features, 1e-4 * normal(rows, lags), weights, frequency * (1 + 0.1 * normal(width)),
            normal(rows, width) * width**-0.5, torch.linspace(-3, -15, rows, device=device()))


def plain_filter(features: Tensor, dh: Tensor, weights: Sequence[Tensor], freq: Tensor, last: Tensor, decay: Tensor,
                 dtype: torch.dtype) -> list[Tensor]:
    """h and the gradients at freq, last and the trunk, by torch in `dtype`."""
    leaves = [t.to(dtype).requires_grad_() for t in (freq, last, *weights)]
    a = z = features.to(dtype)
    for weight, bias in zip(leaves[2::2], leaves[3::2], strict=True):
        a = torch.sin(leaves[0] * torch.nn.functional.linear(a, weight, bias))
    h = leaves[1].mm(a.t()) * (torch.exp(decay.to(dtype)[:, None] * z[:, 0]) + 0.05)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(dtype))]


def check_filter(lags: int, rows: int, width: int, emb: int, layers: int, frequency: float) -> dict[str, float]:
    """At frequency 1 to 1e-5, at others to three times the error of torch's own operations in float32."""
    features, dh, *rest = given = filter_inputs(lags, rows, width, emb, layers, frequency)
    want = plain_filter(*given, torch.float64)
    found = [filters.forward(features, *rest, 0.05), *filters.backward(features, dh, *rest, 0.05)]
    allowed = [1e-5] * len(want)
    if frequency != 1:
        allowed = [max(1e-5, 3 * relative(a, b)) for a, b in zip(plain_filter(*given, FP32), want, strict=True)]
    names = ("h", "dfreq", "dlast", *(f"d{kind}{k}" for k in range(layers) for kind in ("weight", "bias")))
    return {name: relative(a, b) / limit
            for name, a, b, limit in zip(names, found, want, allowed, strict=True)}


CHECKS: dict[str, Callable[[], dict[str, float]]] = {
    "filter 1,000,003 x 64": partial(check_filter, 1000003, 64, 64, 5, 3, 1.0),
    "filter 262,147 x 256, frequency 10": partial(check_filter, 262147, 256, 64, 5, 3, 10.0),
    "filter 65,536 x 128, frequency 10": partial(check_filter, 65536, 128, 64, 5, 3, 10.0),
    "filter of width 128": partial(check_filter, 70001, 768, 128, 9, 3, 1.0),
    "filter of width 16": partial(check_filter, 1000, 1, 16, 3, 2, 1.0),
    "filter of width 96": partial(check_filter, 5, 65, 96, 5, 2, 1.0),
    "filter of one layer, one lag": partial(check_filter, 1, 3, 32, 5, 1, 1.0),
    "norm 524,291 x 256": partial(check_norm, 524291, 1, 256),
    "norm 43,691 x 3 x 256": partial(check_norm, 43691, 3, 256),
    "norm 100,003 x 96": partial(check_norm, 100003, 1, 96),
    "norm 65,537 x 2 x 128, fp16": partial(check_norm, 65537, 2, 128, dtype=FP16, product=FP16),
    "norm 65,536 x 768": partial(check_norm, 65536, 1, 768),
    "norm 20,001 x 4096, float32": partial(check_norm, 20001, 1, 4096, product=FP32),
    "norm of one token": partial(check_norm, 1, 1, 256),
    "norm of 2^31 elements": check_far_norm,
    "norm 100,003 x 96, padded": partial(check_norm, 100003, 1, 96, padding=8),
    "projection 131,072 x 256": partial(check_projection, 131072, 1, 256),
    "projection 65,537 x 3 x 96, fp16": partial(check_projection, 65537, 3, 96, FP16),
    "gelu 131,075 x 1024": partial(check_gelu, 131075, 1024, BF16),
    "gelu 100,003 x 384, fp16": partial(check_gelu, 100003, 384, FP16),
    "gelu 16,384 x 3072, float32": partial(check_gelu, 16384, 3072, FP32),
    "gelu 1 x 130": partial(check_gelu, 1, 130, FP32),
    "gelu of 2^31 elements": check_far_gelu,
    "mlp 131,075 x 256": partial(check_mlp, 131075, 256, BF16),
    "mlp 100,003 x 128, fp16": partial(check_mlp, 100003, 128, FP16),
    "mlp 1 x 96": partial(check_mlp, 1, 96, BF16),
    "mlp of 2^31 elements": partial(check_mlp, 2**21 + 3, 256, BF16, last=100),
    "last product 131,075 x 2 x 256": partial(check_product, 131075, 2, 256),
    "last product 262,144 x 256": partial(check_product, 262144, 1, 256),
    "last product 33,334 x 3 x 96, fp16": partial(check_product, 33334, 3, 96, FP16),
    "last product 1 x 7": partial(check_product, 1, 1, 7),
    "last product of 2^31 elements": check_far_product,
}


def main(index: int, processes: int) -> None:
    for name in list(CHECKS)[index::processes]:
        try:
            print(ERRORS + json.dumps({"case": name, "errors": CHECKS[name]()}), flush=True)
        except Exception as error:  # noqa: BLE001 - the others are to be tried too
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
