"""Ranks that split the model or its tokens equal one rank on the same device, over NCCL: two that share a GPU, and one
on each GPU where there are several. tests/dist/test_parallel.py asks the same of gloo, in every combination."""

from typing import Any

import pytest
import torch

from benchmarks.gpu.nccl import first_gpu
from hyena_dist.parallel.groups import Groups, init_groups
from tests.dist.test_parallel import Case, compare
from tests.gpu.devices import CPU, CUDA, GPU
from tests.gpu.ranks import run_ranks

TOLERANCE = {"fp64": 1e-9, "fp32": 2e-5, "bf16": 6e-2}
FFT = "distributed_fft"


def cases(ranks: int) -> list[Case]:
    """Tensor, context and data ranks, each way to split tokens, overlapped and not, in every precision."""
    return [Case(1, ranks, 1, precision="fp32"), Case(1, ranks, 1, precision="fp32", method=FFT),
            Case(ranks, 1, 1, precision="fp32"), Case(ranks, 1, 1, precision="fp32", sequence=True),
            Case(1, 1, ranks, precision="fp32"), Case(1, ranks, 1, precision="bf16", overlap=2),
            Case(1, ranks, 1, precision="fp32", order=3, overlap=2, recompute="full"), Case(1, ranks, 1),
            Case(1, ranks, 1, method=FFT, overlap=2), Case(1, ranks, 1, precision="bf16", pattern="HA", method=FFT),
            *([Case(2, ranks // 2, 1, precision="fp32", sequence=True)] if ranks >= 4 else [])]


def _errors(device: torch.device, chosen: list[Case]) -> list[tuple[float, str]]:
    """The worst quantity of every case, on this rank."""
    made: dict[tuple[int, int], Groups] = {}
    found = []
    for case in chosen:
        shape = case.tensor, case.context
        made[shape] = made.get(shape) or init_groups(tensor=case.tensor, context=case.context)
        found.append(max((error, name) for name, error in compare(case, made[shape], device=device).items()))
        print(f"{case}: {found[-1]}", flush=True)  # which one it was, should the next one hang
    return found


def check(device: torch.device, ranks: int, record_property: Any, **options: Any) -> None:
    chosen = cases(ranks)
    for case, *of_ranks in zip(chosen, *run_ranks(device, _errors, ranks, chosen, **options), strict=True):
        error, name = max(of_ranks)
        record_property(str(case), error)
        print(f"{case}: worst {name} {error:.1e}, tolerance {TOLERANCE[case.precision]}")
        assert error < TOLERANCE[case.precision], (case, name)


@pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu", marks=pytest.mark.slow),
                                    pytest.param(CUDA, id="cuda", marks=GPU)])
def test_two_ranks_that_share_a_device_equal_one(device: torch.device, record_property: Any) -> None:
    check(device, 2, record_property)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one rank per GPU needs two GPUs: pytest -m gpu, on them")
def test_ranks_on_gpus_of_their_own_equal_one(record_property: Any) -> None:
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    check(CUDA, ranks, record_property, environments=[{}] * ranks)


@pytest.mark.parametrize("device", [pytest.param(CUDA, id="cuda", marks=GPU)])
def test_two_ranks_of_one_host_on_a_gpu_are_refused_in_a_line(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"ranks 0 and 1 share GPU .* start at most 1 rank there"):
        run_ranks(device, _errors, 2, [], environments=[{"CUDA_VISIBLE_DEVICES": first_gpu()}] * 2)
