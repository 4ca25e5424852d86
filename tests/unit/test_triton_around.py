"""The kernels around the operator in Triton's interpreter, values and every gradient against float64."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.counting import CallCounter
from hyena_dist.ops import backends
from hyena_dist.ops.hyena import HyenaWeights, hyena
from hyena_dist.ops.linear import to_channels
from hyena_dist.ops.mix import Asked
from hyena_dist.ops.norm import NormTape, NormWeights

pytest.importorskip("triton", reason="needs the extra `kernels`")

# 2-norms of errors, the interpreter's cutting off of bfloat16 among them (`test_triton`). A wrong row makes an error
# above 0.1.
FLOAT32, FLOAT16, BFLOAT16 = 2e-6, 1.5e-3, 5e-3
FAST = {
    "norm 96": FLOAT32, "norm 128, three rows": FLOAT32, "norm 256 bf16": BFLOAT16, "norm 256, half": FLOAT16,
    "norm 96, padded": FLOAT16, "norm 256 bf16, padded, three rows": BFLOAT16, "norm 8, padded, one token": FLOAT16,
    "norm 768": FLOAT32, "norm 7, one token": FLOAT32, "norm 1100": FLOAT32,
    "gelu": FLOAT32, "gelu, large": FLOAT32, "gelu bf16": BFLOAT16, "gelu fp16": FLOAT16,
    "mlp fp16": FLOAT16, "mlp fp16, chunks": FLOAT16, "mlp fp16, as wide inside": FLOAT16,
    "mlp fp16, no token": FLOAT16,
    "one kernel": FLOAT16, "one kernel, large": FLOAT16, "one kernel bf16": BFLOAT16,
    "one kernel, 256": FLOAT16, "one kernel, one token": FLOAT16,
    "last product": FLOAT16, "last product, 256": FLOAT16, "last product bf16": BFLOAT16,
    "last product of one": FLOAT16, "last product, neither": FLOAT16, "operator fp16": 2 * FLOAT16,
    "last product, far": FLOAT32, "last product, many rows": FLOAT32,
    "mlp": FLOAT32, "linear": FLOAT32, "to channels": FLOAT32, "to channels, one row": FLOAT32, "layer norm": FLOAT32,
    "bias as a column": FLOAT16, "bias as a column, chunks of one row": FLOAT16,
    "bias as a column, bf16, chunks": 3 * BFLOAT16,  # a CPU rounds the sum of each chunk
}
FAST |= {"filter": 1e-5, "filter of width 16": 1e-5, "filter of width 96": 1e-5, "filter of one layer": 1e-5,
         "filter of frequency 10": 3.0, "declared": 1e-3}
CONTROLS = {"filter, control": ("0", 0.1), "norm, control": ("y", 0.1), "gelu, control": ("y", 1e-4),
            "one kernel, control": ("y", 0.1), "last product, control": ("dy", 0.1),
            "another channel's bias, control": ("0", 0.1), "the last chunk's gradient, control": ("3", 0.1)}
"""(what must be wrong, by how much at least)"""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """All in one process of the interpreter."""
    done = subprocess.run([sys.executable, "-m", "tests.triton_around", *FAST, *CONTROLS], capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=590)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients(found, name):
    print(name, found[name], "allowed", FAST[name], "wrong rows", 0.1)
    assert max(found[name].values()) < FAST[name]


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_wrong_is_seen(found, name):
    what, least = CONTROLS[name]
    assert found[name][what] > least


CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(("device", "dtype", "channels", "backend", "taken"), [
    (META, torch.bfloat16, 256, "triton", True), (META, torch.float16, 96, "triton", True),
    (META, torch.bfloat16, 100, "triton", False), (META, torch.float32, 96, "triton", False),
    (META, torch.bfloat16, 96, "torch", False), (CPU, torch.bfloat16, 96, "auto", False)])
def test_where_the_projections_bias_costs_no_pass(device, dtype, channels, backend, taken):
    """It is a column of the product where the norm's kernel writes rows of half precision that stay aligned, and
    nowhere else: no pass over the result adds it, and none sums its gradient."""
    x = torch.empty(64, 2, channels, device=device, requires_grad=True)
    weight, bias = (torch.empty(*shape, device=device, requires_grad=True) for shape in ((24, channels), (24,)))
    norm = torch.empty(2, channels, device=device)
    with CallCounter(device) as counter, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = to_channels(x, weight, bias, NormWeights(*norm, 1e-5, backend))
        y.backward(torch.empty_like(y))
    passes = {name for _, name in counter.operators if name.startswith(("aten.add.out", "aten.sum"))}
    assert passes == (set() if taken else {"aten.add.out", "aten.sum.dim_IntList"})
    assert ("aten.bmm.out" in {name for _, name in counter.operators}) == taken
    assert bias.grad.shape == bias.shape


@pytest.mark.parametrize(("dtype", "channels", "backend", "taken"), [
    (torch.bfloat16, 256, "triton", True), (torch.float16, 96, "triton", True), (torch.bfloat16, 257, "triton", False),
    (torch.float32, 96, "triton", False), (torch.bfloat16, 96, "torch", False)])
def test_where_one_kernel_does_the_operators_last_product(dtype, channels, backend, taken):
    """And nowhere else: no pass lowers the gradient at the result, adds the residual, or sums for the bias."""
    inner, tokens = 4, 64
    shapes = ((tokens, 2, channels), (3 * inner, channels), (3 * inner,), (3 * inner, 3), (3 * inner,),
              (1, inner, tokens), (1, inner), (channels, inner), (channels,))
    x, *weights = (torch.empty(*shape, device=META, requires_grad=True) for shape in shapes)
    with CallCounter(META) as counter, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = hyena(x, HyenaWeights(*weights), residual=True, backend=backend)
        y.backward(torch.empty_like(y))
    found = {name for _, name in counter.operators}
    assert ({"hyena.project.default", "hyena.project_backward.default"} <= found) == taken
    assert ("aten.baddbmm.out" in found) != taken
    assert (y.dtype, y.shape) == (torch.float32, x.shape)
    assert all(t.grad.shape == t.shape for t in (x, *weights))


@pytest.mark.parametrize(("choose", "message"), [
    (lambda backend: backends.norm_kernels(backend, CPU, torch.float32, 4097), "at most 4,096 channels"),
    (lambda backend: backends.norm_kernels(backend, CPU, torch.float64, 8), "no float64"),
    (lambda backend: backends.gelu_kernels(backend, CPU, torch.float64), "no float64"),
    (lambda backend: backends.filter_kernels(backend, torch.zeros(129, 5), torch.zeros(8, 129)), "at most 128"),
    (lambda backend: backends.filter_kernels(backend, *torch.zeros(2, 8, 8).bfloat16()), "of float32"),
    (lambda backend: backends.filter_kernels(backend, *torch.zeros(2, 8, 8).double()), "no float64"),
])
def test_what_the_kernels_cannot_is_left_to_torch(caplog, monkeypatch, choose, message):
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    backends.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose("auto") is None
        assert not caplog.records
        assert choose("triton") is None
    assert message in caplog.text


def test_auto_takes_each_where_it_was_measured(monkeypatch):
    """The control: nowhere else."""
    choices = {"operator": lambda: backends.mix_kernels("auto", Asked(CPU, torch.bfloat16, 2, 3, length=1024)),
               "norm": lambda: backends.norm_kernels("auto", CPU, torch.bfloat16, 4096),
               "gelu": lambda: backends.gelu_kernels("auto", CPU, torch.bfloat16),
               "mlp": lambda: backends.mlp_kernels("auto", CPU, torch.bfloat16, 256),
               "project": lambda: backends.project_kernels("auto", CPU, torch.bfloat16, 256),
               "filter": lambda: backends.filter_kernels("auto", torch.zeros(128, 5), torch.zeros(8, 128))}
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    for name in choices:
        dtype = torch.float32 if name == "filter" else torch.bfloat16
        monkeypatch.setattr(backends, "_MEASURED", {other: frozenset() for other in choices}
                            | {name: frozenset([((9, 0), dtype)])})
        taken = {other: choose() for other, choose in choices.items()}
        assert [other for other, module in taken.items() if module] == [name]
        assert taken[name].__name__ == f"hyena_dist.ops.triton.{name}"
    monkeypatch.setattr(backends, "_MEASURED", {name: frozenset([((9, 0), torch.bfloat16), ((9, 0), torch.float32)])
                                                for name in choices})
    asked, norm = Asked(CPU, torch.bfloat16, 2, 3, length=2**20), (torch.ones(8), torch.zeros(8), 1e-5)
    for backend in ("auto", "triton"):  # neither kept spectra nor padded rows were measured
        assert backends.mix_kernels(backend, asked).keeps_spectra == (backend == "triton")
        tape = NormTape((*norm, backend), torch.float32, torch.bfloat16, padding=8)
        assert tape.padding == (8 if backend == "triton" else 0)
    monkeypatch.setattr(backends, "_installed", lambda: False)
    assert not any(choose() for choose in choices.values())
