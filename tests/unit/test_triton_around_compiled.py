"""What the kernels around the operator compile to for GPUs of capability 9.0 and 8.0, without one."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `kernels`")

from hyena_dist.ops.triton import filter as filters
from hyena_dist.ops.triton import gelu, norm
from tests.kernel_report import Launch, launches, report

BF16 = torch.bfloat16
SPILLS = {"filter.layer_backward": 128}
"""Bytes of spill stores for each thread, at most, on capability 9.0; of the others 64."""


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def norms(channels: int) -> list[Launch]:
    x, weight = torch.zeros(64, channels), torch.zeros(channels)

    def work() -> None:
        norm.forward(x, weight, weight, 1e-5, BF16)
        norm.backward(x, x.to(BF16), weight, 1e-5, torch.zeros_like(x), x)

    return launches(work)


def gelus(width: int) -> list[Launch]:
    h = torch.zeros(64, width, dtype=BF16)

    def work() -> None:
        gelu.forward(h, torch.zeros_like(h))
        gelu.backward(h, torch.zeros_like(h), torch.zeros_like(h))

    return launches(work)


def of_filter(width: int) -> list[Launch]:
    weights = [torch.zeros(width, 5), *(torch.zeros(*shape) for shape in ((width,), (width, width)) * 2),
               torch.zeros(width)]
    features, last = torch.zeros(256, 5), torch.zeros(256, width)

    def work() -> None:
        filters.forward(features, weights, weights[1], last, torch.zeros(256), 0.05)
        filters.backward(features, torch.zeros(256, 256), weights, weights[1], last, torch.zeros(256), 0.05)

    return launches(work)


def check(found: list[Launch], capability: int = 90) -> None:
    for launch in found:
        got = report(launch, capability)
        print(launch.name, dict(launch.constants), dict(launch.options), got)
        assert got.wide_loads, launch
        assert got.shared <= 99 * 2**10, launch
        assert not got.serialized, launch
        assert not got.misplaced, launch
        if capability == 90:
            assert got.spilled <= SPILLS.get(launch.name, 64), launch
            assert got.wgmma or not launch.name.startswith("filter"), launch


def test_norm_and_gelu_are_compiled_for_a_gpu_that_is_not_there():
    """The control: of an odd width no load is of 16 bytes."""
    check(norms(256))
    check(gelus(1024))
    with pytest.raises(AssertionError, match="gelu_backward"):
        check([launch for launch in gelus(1023) if launch.name == "gelu.gelu_backward"])


@pytest.mark.slow
@pytest.mark.parametrize("channels", [96, 128, 768, 1024, 4096])
def test_norms_of_other_widths(channels):
    check(norms(channels))
    check(norms(channels), 80)


@pytest.mark.slow
def test_the_filter_on_a_hopper():
    check(of_filter(64))


@pytest.mark.slow
def test_the_filter_on_a_gpu_with_less_shared_memory():
    check(of_filter(64), 80)
