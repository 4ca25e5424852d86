"""Triton's kernels around the operator on a GPU: against float64 at real sizes, twenty runs equal bit for bit, their
times beside torch's operations and with other launch options, and a step with and without each."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import around_cases as cases
from benchmarks.gpu.measure import Size, cost, forget_peak, kernels
from benchmarks.gpu.task import Task, device, median_seconds, outcome
from hyena_dist.ops import backends
from hyena_dist.ops.implicit_filter import FilterShape, implicit_filter
from hyena_dist.ops.linear import linear_from_channels, linear_from_channels_input_gradients, to_channels
from hyena_dist.ops.mlp import MLPWeights, mlp
from hyena_dist.ops.norm import NormTape, NormWeights
from hyena_dist.ops.triton import filter as filters
from hyena_dist.ops.triton import gelu, norm, project
from hyena_dist.ops.triton import mlp as one_kernel

CHECK_SECONDS = 60.0
PROCESSES = 10
RUNS = 20
TOKENS, WIDTH = 1 << 20, 256
STEP = Size(8, 256, 1 << 20, backend="triton")
AROUND = ("norm", "gelu", "mlp", "project", "filter")

Work = Callable[[], object]


def run(task: Task) -> None:
    if task.tiny:
        task.note("the kernels need a GPU; on a CPU the interpreter runs them, in tests/unit/test_triton_around.py")
        return
    task.attempt("check", lambda: check(task))
    for name, make in {"norm": norm_sides, "gelu": gelu_sides, "filter": filter_sides, "mlp": mlp_sides,
                       "norm and projection": projection_sides, "last product": product_sides}.items():
        if task.left() > 5:
            task.attempt(f"times of {name}", lambda name=name, make=make: times(task, name, make))
            forget_peak()
    for name, repeated in {"norm": repeat_norm, "gelu": repeat_gelu, "mlp": repeat_mlp,
                           "last product": repeat_product, "filter": repeat_filter}.items():
        task.attempt(f"{name} repeated", lambda name=name, repeated=repeated: repeat(task, name, repeated))
        forget_peak()
    if task.left() > 20:
        task.attempt("steps", lambda: steps(task))
    for name, options in OPTIONS.items():
        if task.left() > 5:
            task.attempt(f"options of {name}", lambda name=name, options=options: try_options(task, name, options))
            forget_peak()


def check(task: Task) -> None:
    """In processes beside each other: one that fails takes its own cases with it, and no others."""
    started, running = time.monotonic(), []
    for i in range(PROCESSES):
        log = (task.work / f"check-{i}.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.gpu.around_cases", str(i), str(PROCESSES)]
        running.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                         env=os.environ | {"OMP_NUM_THREADS": "1"}), log))
    right = 0
    for process, log in running:
        try:
            process.wait(max(0.1, min(CHECK_SECONDS, task.left() - 10) - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            task.note("a check did not end in time", ok=False)
        log.seek(0)
        for line in log.read().splitlines():
            if line.startswith(cases.ERRORS):
                found = json.loads(line.removeprefix(cases.ERRORS))
                good = all(error < 1 for error in found["errors"].values())  # NaN is not
                right += good
                text = f"{found['case']}: " + " ".join(f"{name} {e:.2g}" for name, e in found["errors"].items())
                task.note("" if good else text + " of what is allowed", ok=good, **found)
            elif line.startswith("FAILED"):
                task.note(line[:190], ok=False)
    task.note(f"values and every gradient right in {right} of {len(cases.CHECKS)} cases around the operator, "
              f"{time.monotonic() - started:.0f} s", ok=right == len(cases.CHECKS))


def norm_sides(backend: str) -> dict[str, Work]:
    x, residual, weight, bias, dy = cases.norm_inputs(TOKENS, 1, WIDTH, torch.float32, torch.bfloat16)
    tape, dx = NormTape((weight, bias, 1e-5, backend), torch.float32, torch.bfloat16), torch.empty_like(x)
    dy = dy.to(tape.reads)
    tape.forward(x)
    return {"forward": partial(tape.forward, x), "backward": partial(tape.backward, dy, dx, residual)}


def gelu_sides(backend: str) -> dict[str, Work]:
    h, da = (cases.normal(TOKENS // 4, 4 * WIDTH, dtype=torch.bfloat16) for _ in range(2))
    if backend == "torch":
        def backward() -> object:
            torch.nn.functional.gelu(h, approximate="tanh")
            return torch.ops.aten.gelu_backward(da, h, approximate="tanh").sum(0, dtype=torch.float32)
        return {"forward": partial(torch.nn.functional.gelu, h, approximate="tanh"), "backward": backward}
    out = torch.empty_like(h)
    return {"forward": partial(gelu.forward, h, out), "backward": partial(gelu.backward, h, da, out)}


def filter_sides(backend: str) -> dict[str, Work]:
    _, dh, weights, freq, last, decay = cases.filter_inputs(TOKENS, WIDTH, 64, 5, 3, 10.0)
    leaves = [t.requires_grad_() for t in (freq, last, *weights)]
    trunk = list(zip(leaves[2::2], leaves[3::2], strict=True))

    def forward() -> Tensor:
        return implicit_filter(trunk, freq, last, decay, FilterShape(TOKENS, 5, 0.05), slice(0, TOKENS),
                               backend=backend)

    h = forward()
    return {"forward": torch.no_grad()(forward),
            "backward": lambda: torch.autograd.grad(h, leaves, dh, retain_graph=True)}


def mlp_sides(backend: str) -> dict[str, Work]:
    inner = 4 * WIDTH
    tensors = [0.05 * cases.normal(*shape) for shape in
               ((inner, WIDTH), (inner,), (WIDTH, inner), (WIDTH,), (WIDTH,), (WIDTH,))]
    return _function(lambda x, *t: mlp(x, MLPWeights(*t[:4]), NormWeights(*t[4:], 1e-5, backend), residual=True,
                                       backend=backend), tensors)


def projection_sides(backend: str) -> dict[str, Work]:
    tensors = [0.05 * cases.normal(*shape) for shape in ((3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH,), (WIDTH,))]
    return _function(lambda x, *t: to_channels(x, *t[:2], NormWeights(*t[2:], 1e-5, backend)), tensors)


def product_sides(backend: str) -> dict[str, Work]:
    """Backward without the weight's gradient."""
    y, weight, bias, residual, dout = cases.product_inputs(TOKENS, 1, WIDTH, torch.bfloat16)
    kernels = project if backend == "triton" else None
    return {"forward": lambda: linear_from_channels(y, weight, bias, residual, kernels),
            "backward": lambda: linear_from_channels_input_gradients(dout, weight, bias, y.dtype, kernels)}


def _function(function: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Work]:
    leaves = [t.requires_grad_() for t in (cases.normal(TOKENS, 1, WIDTH), *tensors)]

    def forward() -> Tensor:
        with torch.autocast(device().type, torch.bfloat16):
            return function(*leaves)

    y = forward()
    dy = torch.randn_like(y)
    return {"forward": torch.no_grad()(forward),
            "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}


def times(task: Task, name: str, make: Callable[[str], dict[str, Work]]) -> None:
    found: dict[str, dict[str, float]] = {}
    profiles: dict[str, Any] = {}
    for backend in ("torch", "triton"):
        works = make(backend)
        found[backend] = {what: 1e3 * median_seconds(work) for what, work in works.items()}
        if backend == "triton":
            profiles = {what: kernels(work).by_name[:8] for what, work in works.items()}
        del works
        forget_peak()
    task.note(f"{name} at {TOKENS:,} x {WIDTH}, ms: " + "; ".join(f"{backend} {outcome(numbers)}" for backend, numbers
                                                                  in found.items()), times=found, profiles=profiles)
    if name == "filter":
        for what, rows in profiles.items():
            task.note(f"  {what}: " + ", ".join(f"{n.split('(')[0][:26]} {count}x {s * 1e3:.2f}"
                                                for n, count, s in rows))


def repeat_norm() -> list[Tensor]:
    x, residual, weight, bias, dy = cases.norm_inputs(TOKENS, 1, WIDTH, torch.float32, torch.bfloat16)
    dx = torch.empty_like(x)
    return [norm.forward(x, weight, bias, 1e-5, torch.bfloat16), norm.backward(x, dy, weight, 1e-5, dx, residual), dx]


def repeat_gelu() -> list[Tensor]:
    torch.manual_seed(cases.SEED)
    h, da = (cases.normal(TOKENS // 8, 4 * WIDTH, dtype=torch.bfloat16) for _ in range(2))
    y, a = torch.empty_like(h), torch.empty_like(h)
    gelu.forward(h, y)
    return [y, gelu.backward(h, da, a), da, a]


def repeat_mlp() -> list[Tensor]:
    return list(cases.run_mlp(*cases.mlp_inputs(TOKENS // 4 + 3, WIDTH, torch.bfloat16)).values())


def repeat_product() -> list[Tensor]:
    return list(cases.run_product(*cases.product_inputs(TOKENS // 4 + 3, 2, WIDTH, torch.bfloat16)).values())


def repeat_filter() -> list[Tensor]:
    features, dh, *rest = cases.filter_inputs(TOKENS // 2 + 3, 128, 64, 5, 3, 10.0)
    return [filters.forward(features, *rest, 0.05), *filters.backward(features, dh, *rest, 0.05)]


def repeat(task: Task, name: str, work: Callable[[], list[Tensor]]) -> None:
    first = work()
    different = sum(not all(map(torch.equal, first, work())) for _ in range(RUNS - 1))
    task.note(f"{name}: {RUNS} runs, {different} different", ok=not different)


@contextlib.contextmanager
def only(*modules: str) -> Iterator[None]:
    """The operator's kernels, and of those around it these."""
    chosen = backends._chosen

    def some(module: str, *rest: Any) -> Any:
        return None if module in AROUND and module not in modules else chosen(module, *rest)

    with patch.object(backends, "_chosen", some):
        yield


def steps(task: Task) -> None:
    """A training step with all of them, with none, with GELU's in place of the whole MLP's, and with each alone.
    Milliseconds, and GiB at the peak."""
    for modules in (AROUND, (), ("norm", "gelu", "filter"), ("norm",), ("gelu",), ("mlp",), ("project",),
                    ("filter",)):
        if task.left() < 8:
            return
        with only(*modules):
            found, step = cost(STEP, rounds=3, at_most=4.0)
            del step
        task.note(f"{STEP} with kernels of {', '.join(('the operator', *modules))}: {found.text()}",
                  modules=modules, numbers=found.numbers())
        forget_peak()


Options = tuple[Callable[[str], dict[str, Work]], dict[str, Callable[[], contextlib.AbstractContextManager]]]


def constant(module: Any, **values: int) -> Callable[[], contextlib.AbstractContextManager]:
    """Other values of a module's constants."""
    return lambda: patch.multiple(module, **values)


@contextlib.contextmanager
def trunk(lags: int, warps: int) -> Iterator[None]:
    """Other tiles of the filter's kernels."""
    made = filters._Trunk.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        self.lags, self.options = {"LAGS": lags}, self.options | {"num_warps": warps}

    with patch.object(filters._Trunk, "__init__", make):
        yield


def tile(module: Any, warps: int, stages: int, **others: int) -> contextlib.AbstractContextManager:
    """Another tile of a module's kernels."""
    plan = module._plan

    def of(tensor: Tensor, *, backward: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        sizes, _ = plan(tensor, backward=backward)
        return sizes | others, {"num_warps": warps, "num_stages": stages}

    return patch.object(module, "_plan", of)


OPTIONS: dict[str, Options] = {
    "norm": (norm_sides, {
        "as it is": contextlib.nullcontext, "half the tile": constant(norm, TILE=512),
        "twice": constant(norm, TILE=2048), "2048 programs": constant(norm, PROGRAMS=2048),
        "4096": constant(norm, PROGRAMS=4096)}),
    "gelu": (gelu_sides, {
        "as it is": contextlib.nullcontext, "8 rows": constant(gelu, ROWS=8), "32": constant(gelu, ROWS=32),
        "1024 programs": constant(gelu, PROGRAMS=1024), "flat 1024": constant(gelu, FLAT=1024),
        "4096": constant(gelu, FLAT=4096)}),
    "mlp": (mlp_sides, {
        "as it is": contextlib.nullcontext,
        "blocks of 64, 2 stages": partial(tile, one_kernel, 8, 2, ROWS=128, BLOCK=64),
        "blocks of 64, 1 stage": partial(tile, one_kernel, 8, 1, ROWS=128, BLOCK=64),
        "64 rows, 2 programs": partial(tile, one_kernel, 4, 1, ROWS=64, BLOCK=32),
        "64 rows, 8 warps": partial(tile, one_kernel, 8, 1, ROWS=64, BLOCK=32)}),
    "last product": (product_sides, {
        "as it is": contextlib.nullcontext, "4 warps": partial(tile, project, 4, 2),
        "blocks of 32, 3 stages": partial(tile, project, 8, 3, BLOCK=32),
        "blocks of 64": partial(tile, project, 8, 2, BLOCK=64),
        "128 tokens": partial(tile, project, 8, 2, TOKENS=128)}),
    "filter": (filter_sides, {
        "as it is": contextlib.nullcontext, "512 programs": constant(filters, PROGRAMS=512),
        "chunks of 2^17": constant(filters, CHUNK=2**17), "2^18": constant(filters, CHUNK=2**18),
        "32 lags": partial(trunk, 32, 4), "64 lags, 8 warps": partial(trunk, 64, 8),
        "128 lags, 8 warps": partial(trunk, 128, 8)}),
}


def try_options(task: Task, name: str, options: Options) -> None:
    make, variants = options
    found: dict[str, dict[str, float]] = {}
    works = make("triton")
    for label, change in variants.items():
        if task.left() < 3:
            break
        try:
            with change():
                found[label] = {what: 1e3 * median_seconds(work, rounds=3, at_most=1.0) for what, work in works.items()}
        except Exception as error:  # noqa: BLE001 - another option may work
            print(name, label, error, flush=True)
            found[label] = dict.fromkeys(works, float("nan"))
    task.note(f"{name}, ms: " + "; ".join(f"{label} {outcome(numbers)}" for label, numbers in found.items()),
              options=found)
