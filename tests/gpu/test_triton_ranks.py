"""The operator over two context ranks that share a GPU, by Triton's kernels, against torch's operations in float64 on
the same ranks. tests/triton_ranks.py asks the same of the interpreter."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hyena_dist.parallel.groups import Axis
from tests.compare import rel
from tests.context_operator import Sizes, computed
from tests.gpu.devices import CPU, CUDA, GPU
from tests.gpu.ranks import run_ranks

RANKS = 2
TOLERANCE = {"fp32": 2e-5, "bf16": 9e-2}
"""Of bfloat16 for the gradient of `bias`, sums of many signs: tests/gpu/test_ranks.py allows 6e-2 of a model's."""
WRONG = 0.1


@dataclass(frozen=True)
class Case:
    """Rows of `ranks * length` tokens."""

    length: int
    precision: str = "bf16"
    order: int = 2
    recompute: bool = False
    segmented: bool = False

    def options(self) -> dict[str, Any]:
        """Of `hyena`. Segments end on a slice's border, just before and behind one, and nowhere."""
        n = self.length
        segments = ((0, n - 1, n + 1, n + 2, 2 * n), (0, 2 * n), (0, n, n + n // 2, 2 * n)) if self.segmented else None
        return {"order": self.order, "recompute": self.recompute, "segments": segments}


CASES = [Case(512), Case(512, "fp32"), Case(509, "fp32", order=3, recompute=True), Case(509, segmented=True),
         Case(65_536), Case(65_536, "fp32"), Case(65_531, order=3, recompute=True), Case(65_531, segmented=True)]
"""Of rows that one kernel convolves, and three."""
ON_CPU = [Case(64, "fp32"), Case(61, order=3, recompute=True), Case(61, "fp32", segmented=True)]
"""By torch's operations, to try the test."""


def _errors(device: torch.device, cases: list[Case]) -> list[dict[str, float]]:
    """Of every case the largest error of each quantity on this rank; of one with segments also what it is to leave out
    their borders, as `control`."""
    axis, found = Axis.of(dist.group.WORLD), []
    backend = "triton" if device.type == "cuda" else "torch"
    for case in cases:
        sizes = Sizes(case.length, batch=3, width=16, channels=8)
        got = computed(axis, backend, torch.float32, sizes, device=device, **case.options(),
                       lowered=torch.bfloat16 if case.precision == "bf16" else None)
        want = computed(axis, "torch", torch.float64, sizes, device=device, **case.options())
        errors = {what: rel(got[what], want[what]) for what in want}
        if case.segmented:
            borderless = computed(axis, backend, torch.float32, sizes, device=device)
            errors["control"] = rel(borderless["y"], want["y"])
        found.append(errors)
        print(f"{case}: {errors}", flush=True)  # which one it was, should the next one hang
    return found


@pytest.mark.parametrize(("device", "cases"), [pytest.param(CPU, ON_CPU, id="cpu", marks=pytest.mark.slow),
                                               pytest.param(CUDA, CASES, id="cuda", marks=GPU)])
def test_two_ranks_by_kernels_equal_float64(device: torch.device, cases: list[Case], record_property: Any) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'hyena-dist[kernels]'")
    for case, *of_ranks in zip(cases, *run_ranks(device, _errors, RANKS, cases), strict=True):
        for errors in of_ranks:
            assert errors.pop("control", 1.0) > WRONG, case
        error, name = max((error, name) for errors in of_ranks for name, error in errors.items())
        record_property(str(case), error)
        print(f"{case}: worst {name} {error:.1e}, tolerance {TOLERANCE[case.precision]}")
        assert error < TOLERANCE[case.precision], (case, name)
