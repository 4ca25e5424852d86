"""The kernels around the operator in Triton's interpreter against float64, as in `tests.triton_cases`:
`python -m tests.triton_around NAME ...` prints {name: {what: error}} as JSON."""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tests.triton_cases import BF16, FP16, FP32, Bands, relative

# Imported after `triton_cases`, which asks for the interpreter.
from hyena_dist.ops import mlp as torch_mlp  # isort: skip
from hyena_dist.ops.linear import linear, to_channels  # isort: skip
from hyena_dist.ops.norm import NormWeights, layer_norm  # isort: skip
from hyena_dist.ops.triton import gelu as gelu_kernels, norm as norm_kernels  # isort: skip


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dy.double())


def norm(tokens: int, batch: int, channels: int, dtype: torch.dtype, *, residual: bool, product: torch.dtype = FP32,
         change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
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
        y = norm_kernels.forward(change(x.transpose(0, 1)), weight, bias, 1e-5, product)
        sums = norm_kernels.backward(x.transpose(0, 1), dy, weight, 1e-5, found_dx,
                                     added.transpose(0, 1) if residual else None)
    return {"y": relative(y, want.detach()), "dx": relative(found_dx, dx), "dweight": relative(sums[0], dweight),
            "dbias": relative(sums[1], dbias), "outside": 0.0 if bands.whole() else float("inf")}


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
        first = gelu_kernels.forward(h, bands.around(torch.full_like(h, float("nan"))))
        a = bands.around(torch.full_like(h, float("nan")))
        dbias = gelu_kernels.backward(h, da, a)
    return {"y": relative(first, want.detach()), "a": relative(a, want.detach()), "dh": relative(da, dh),
            "dbias": relative(dbias, dh.sum(0)), "outside": 0.0 if bands.whole() else float("inf")}


def whole(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> dict[str, float]:
    """A function of tensors and a backend, by kernels and by torch's operations in float64: y and every gradient."""
    results = []
    for dtype, backend in ((FP32, "triton"), (torch.float64, "torch")):
        torch.manual_seed(1)
        leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]
        y = function(backend, *leaves)
        results.append([y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(dtype))])
    return {str(i): relative(a.detach(), b.detach()) for i, (a, b) in enumerate(zip(*results, strict=True))}


def whole_mlp(backend: str, x: Tensor, *tensors: Tensor) -> Tensor:
    return torch_mlp.mlp(x, torch_mlp.MLPWeights(*tensors[:4]), NormWeights(*tensors[4:], 1e-5, backend), residual=True,
                         backend=backend)


def whole_linear(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return linear(x, weight, bias, NormWeights(*norm, 1e-5, backend))


def whole_channels(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return to_channels(x, weight, bias, NormWeights(*norm, 1e-5, backend))


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "norm 96": lambda: norm(37, 1, 96, FP32, residual=True),
    "norm 128, three rows": lambda: norm(13, 3, 128, FP32, residual=False),
    "norm 256 bf16": lambda: norm(11, 2, 256, FP32, residual=True, product=BF16),
    "norm 256, half": lambda: norm(1, 5, 256, FP16, residual=True, product=FP16),
    "norm 768": lambda: norm(5, 1, 768, FP32, residual=False),
    "norm 7, one token": lambda: norm(1, 1, 7, FP32, residual=True),
    "norm 1100": lambda: norm(3, 2, 1100, FP32, residual=True),
    "gelu": lambda: gelu(37, 130, FP32),
    "gelu, large": lambda: gelu(3, 96, FP32, scale=100.0),
    "gelu bf16": lambda: gelu(19, 384, BF16),
    "gelu fp16": lambda: gelu(1, 256, FP16),
    "mlp": lambda: whole(whole_mlp, (7, 2, 12), (48, 12), (48,), (12, 48), (12,), (12,), (12,)),
    "linear": lambda: whole(whole_linear, (7, 3, 12), (5, 12), (5,), (12,), (12,)),
    "to channels": lambda: whole(whole_channels, (7, 3, 12), (5, 12), (5,), (12,), (12,)),
    "to channels, one row": lambda: whole(whole_channels, (9, 1, 12), (5, 12), (5,), (12,), (12,)),
    "layer norm": lambda: whole(lambda backend, x, *w: layer_norm(x, NormWeights(*w, 1e-5, backend)), (7, 3, 12), (12,),
                                (12,)),
    "gelu, control": lambda: gelu(37, 130, FP32, approximate="none"),
    "norm, control": lambda: norm(5, 2, 96, FP32, residual=False, change=lambda x: x.flip(0)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:]}))
