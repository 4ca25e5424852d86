"""What the kernels around the operator compile to for GPUs of capability 9.0 and 8.0, without one."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `kernels`")

from hyena_dist.ops.triton import filter as filters
from hyena_dist.ops.triton import gelu, mlp, norm, project
from hyena_dist.ops.triton.plans import WIDE_MEMORY
from tests.kernel_report import Launch, Report, launches, report

BF16 = torch.bfloat16
SPILLS = {"filter.layer_backward": 128, "mlp.mlp_forward": 128, "project.project_forward": 0,
          "project.project_backward": 0}
"""Bytes of spill stores for each thread, at most, on capability 9.0; of the others 64. Those of the MLP stand before
and after its loop, in which there are none."""


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def norms(channels: int, padding: int = 0) -> list[Launch]:
    x, weight = torch.zeros(64, channels), torch.zeros(channels)

    def work() -> None:
        norm.forward(x, weight, weight, 1e-5, BF16, padding)
        norm.backward(x, x.to(BF16), weight, 1e-5, torch.zeros_like(x), x)

    return launches(work)


def gelus(width: int) -> list[Launch]:
    h = torch.zeros(64, width, dtype=BF16)

    def work() -> None:
        gelu.forward(h, torch.zeros_like(h))
        gelu.backward(h, torch.zeros_like(h), torch.zeros_like(h))

    return launches(work)


def mlps(width: int, dtype: torch.dtype = BF16, *, whole: bool = True) -> list[Launch]:
    """Of a float32 stream, or not `whole`: of tensor ranks, without bias and residual, with gradients of `dtype`."""
    x, n, inner = torch.zeros(64, width), torch.zeros(64, width, dtype=dtype), torch.zeros(64, 4 * width, dtype=dtype)
    first, first_bias, bias, scale = torch.zeros(4 * width, width, dtype=dtype), inner[0], n[0], x[0]
    second = torch.zeros(width, 4 * width, dtype=dtype)

    def work() -> None:
        mlp.forward(x, scale, scale, 1e-5, first, first_bias, second, bias if whole else None, whole, x if whole else n)
        mlp.backward(n, x if whole else n, first, first_bias, second, inner, inner, n, n if whole else None)

    return launches(work)


def products(width: int, tokens: int = 256, residual: torch.dtype = torch.float32) -> list[Launch]:
    y, weight = torch.zeros(1, width, tokens, dtype=BF16), torch.zeros(width, width, dtype=BF16)
    x = torch.zeros(tokens, 1, width, dtype=residual)

    def work() -> None:
        project.forward(y, weight, torch.zeros(width), x, torch.zeros_like(x))
        project.backward(x, weight, torch.zeros_like(y), None if residual == BF16 else x.to(BF16))

    return launches(work)


def of_filter(width: int) -> list[Launch]:
    weights = [torch.zeros(width, 5), *(torch.zeros(*shape) for shape in ((width,), (width, width)) * 2),
               torch.zeros(width)]
    features, last = torch.zeros(256, 5), torch.zeros(256, width)

    def work() -> None:
        filters.forward(features, weights, weights[1], last, torch.zeros(256), 0.05)
        filters.backward(features, torch.zeros(256, 256), weights, weights[1], last, torch.zeros(256), 0.05)

    return launches(work)


def check(found: list[Launch], capability: int = 90, memory: int = 99 * 2**10) -> list[Report]:
    reports = []
    for launch in found:
        got = report(launch, capability)
        print(launch.name, dict(launch.constants), dict(launch.options), got)
        assert got.wide_loads, launch
        assert got.shared <= memory, launch
        assert not got.serialized, launch
        assert not got.misplaced, launch
        if capability == 90:
            assert got.spilled <= SPILLS.get(launch.name, 64), launch
            assert got.wgmma or not launch.name.startswith(("filter", "mlp", "project")), launch
        elif launch.name.startswith(("mlp", "project")):
            assert got.spilled <= 128, launch
            assert got.mma, launch
        reports.append(got)
    return reports


def test_norm_and_gelu_are_compiled_for_a_gpu_that_is_not_there():
    """The control: of an odd width no load is of 16 bytes."""
    check(norms(256))
    check(gelus(1024))
    with pytest.raises(AssertionError, match="gelu_backward"):
        check([launch for launch in gelus(1023) if launch.name == "gelu.gelu_backward"])


@pytest.mark.parametrize("width", [64, *(pytest.param(width, marks=pytest.mark.slow) for width in (96, 128, 256))])
def test_an_mlp_in_one_kernel(monkeypatch, width):
    """The control: with the tile of a Hopper a program of a smaller device has not the memory."""
    check(mlps(width), 90, WIDE_MEMORY)
    monkeypatch.setattr(mlp, "wide_memory", lambda _: False)
    check(mlps(width), 80)
    monkeypatch.setattr(mlp, "wide_memory", lambda _: True)
    if width == 256:
        with pytest.raises(AssertionError, match="mlp_forward"):
            check(mlps(width)[:1], 90)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_an_mlp_of_tensor_ranks_and_of_float16(width):
    """Where products may wait for each other."""
    for launch in [*mlps(width, torch.float16), *mlps(width, whole=False)]:
        got = report(launch)
        assert got.shared <= WIDE_MEMORY
        assert got.wgmma
        assert not got.misplaced, launch


@pytest.mark.parametrize("width", [96, *(pytest.param(width, marks=pytest.mark.slow) for width in (16, 128, 256))])
def test_the_operators_last_product(width):
    """On a Hopper two programs at a time have their registers and their shared memory, and nothing is spilled. The
    control: of an odd width no load is of 16 bytes."""
    found = products(width)
    for launch, got in zip(found, check(found), strict=True):
        assert got.registers * 32 * dict(launch.options)["num_warps"] <= 2**15
    check(found, 80)
    if width == 96:
        with pytest.raises(AssertionError, match="project_forward"):
            check(products(95)[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("width", "tokens", "residual"), [(256, 257, torch.float32), (256, 1, BF16), (256, 256, BF16)])
@pytest.mark.parametrize("capability", [90, 80])
def test_the_operators_last_product_of_other_tokens(width, tokens, residual, capability):
    check(products(width, tokens, residual), capability)


def test_a_padded_row_is_stored_as_wide():
    check_padded(256, 90)


def check_padded(channels: int, capability: int) -> None:
    """The control: with 4 more columns a row does not begin at a multiple of 16 bytes, and no store is of 16."""
    plain, padded, unaligned = (report(norms(channels, padding)[0], capability) for padding in (0, 8, 4))
    print(plain, padded, unaligned)
    assert padded.wide_stores == plain.wide_stores > 0
    assert padded.wide_loads == plain.wide_loads
    assert padded.spilled == 0
    assert unaligned.wide_stores == 0


@pytest.mark.slow
@pytest.mark.parametrize("channels", [96, 128, 768, 1024, 4096])
@pytest.mark.parametrize("capability", [90, 80])
def test_norms_of_other_widths(channels, capability):
    check(norms(channels), capability)
    check(norms(channels, padding=8), capability)
    check_padded(channels, capability)


@pytest.mark.slow
def test_the_filter_on_a_hopper():
    check(of_filter(64))


@pytest.mark.slow
def test_the_filter_on_a_gpu_with_less_shared_memory():
    check(of_filter(64), 80)
