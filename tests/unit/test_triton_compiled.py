"""What the kernels compile to for GPUs of capability 9.0 and 8.0, without one: nothing that an interpreter can see."""

import importlib.util
import re
import subprocess
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the extra `kernels`", allow_module_level=True)

from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton import across, arrived
from hyena_dist.ops.triton.given import Rows
from hyena_dist.ops.triton.groups import Operator
from hyena_dist.ops.triton.plans import WIDE_MEMORY, large_plan, plan_for
from tests.kernel_report import PTXAS, Launch, compiled, launches, report
from tests.machine_code import listing, misplaced_operand

NARROW_MEMORY = 99 * 2**10
SPILLS = {"small.backward": 420, "rows.backward": 600, "small.forward": 250, "rows.forward": 250}
"""Bytes of spill stores for each thread, at most; of the others 64. In float32 twice as many."""
SEEN: set[Launch] = set()


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launched(length: int, dtype: torch.dtype, wide: bool = True, backward: bool = True) -> list[Launch]:
    """By both directions of two channels, of several rows, and of one, whose long filters' gradients are made at
    once."""
    found: dict[Launch, None] = {}
    for batch in (2, 1):
        found |= dict.fromkeys(of_batch(batch, length, dtype, wide, backward))
    return list(found)


def of_batch(batch: int, length: int, dtype: torch.dtype, wide: bool, backward: bool, order: int = 2,
             segmented: bool = False) -> list[Launch]:
    p, dy = torch.zeros(batch, order + 1, 2, length, dtype=dtype), torch.zeros(batch, 2, length, dtype=dtype)
    h, direct = torch.zeros(order - 1, 2, length), torch.zeros(order - 1, 2)
    rows, positions = Rows.whole(p), None
    if segmented:
        rows = replace(rows, places=torch.zeros(batch, 3, dtype=torch.int32))
        positions = torch.zeros(batch, length, dtype=torch.int32)
    run = Operator(p, torch.zeros(2 * order + 2, 3), torch.zeros(2 * order + 2),
                   [(rows, plan_for(length, dtype == torch.float32, wide))], positions)

    def work() -> None:
        run.mix(h, direct)
        if backward:
            run.mix_backward(dy, h, direct)

    return launches(work)


def check(found: list[Launch], capability: int, shared: int, factor: int = 1) -> None:
    for launch in found:
        if (launch, capability) in SEEN:
            continue
        SEEN.add((launch, capability))
        got = report(launch, capability)
        print(launch.name, dict(launch.constants), dict(launch.options), got)
        assert got.spilled <= factor * SPILLS.get(launch.name, 64), launch
        assert got.shared <= shared, launch
        assert not got.serialized, launch
        assert not got.misplaced, launch
        constants = dict(launch.constants)
        if capability == 90 and (constants.get("MB") or constants.get("M") or constants.get("R1") or 0) >= 64:
            assert got.wgmma, launch
        if not launch.name.startswith(("short.", "across.")) and not constants.get("SEGMENTS"):
            assert got.wide_loads, launch


def test_one_kernel_is_compiled_for_a_gpu_that_is_not_there():
    """The control: with hardly any registers it spills."""
    forward, = (launch for launch in launched(1024, torch.bfloat16, backward=False) if launch.name == "small.forward")
    check([forward], 90, WIDE_MEMORY)
    starved = Launch(forward.function, forward.types, forward.constants, forward.divisible,
                     (*forward.options, ("maxnreg", 32)))
    with pytest.raises(AssertionError, match="maxnreg"):
        check([starved], 90, WIDE_MEMORY)


def test_operands_of_products_lie_in_shared_memory(tmp_path):
    """The controls: with less of it, or where nothing writes the register that says where one lies."""
    leave, = (launch for launch in launched(1 << 18, torch.float32, backward=False) if launch.name == "columns.leave")
    kernel = compiled(leave)
    code, threads = listing(kernel.asm["cubin"], tmp_path), 32 * kernel.metadata.num_warps
    shared = kernel.metadata.shared
    assert "HGMMA" in code
    assert not misplaced_operand(code, threads, shared)
    assert "of shared memory" in misplaced_operand(code, threads, shared - 16)
    left = int(re.findall(r"gdesc\[UR(\d+)\]", code)[-1])
    register = f"UR{left + 2}"  # of the right operand
    without = "\n".join(line for line in code.splitlines() if f" {register}, " not in line)
    assert f"nothing known wrote {register}" in misplaced_operand(without, threads, shared)


@pytest.mark.slow
def test_tiles_of_64_rows_and_32_columns_are_what_an_assembler_gets_wrong():
    """Why plans avoid them: an H100's illegal memory access."""
    plan, narrow = plan_for(1 << 18, precise=True, wide=True), {"BC": 32, "num_warps": 4, "num_stages": 1}
    p = torch.zeros(1, 3, 2, 1 << 18)
    run = Operator.whole(p, torch.zeros(6, 3), torch.zeros(6), replace(plan, leave=narrow))
    leave, = (launch for launch in launches(lambda: run.mix(torch.zeros(1, 2, 1 << 18), torch.zeros(1, 2)))
              if launch.name == "columns.leave")
    version = subprocess.run([PTXAS, "--version"], capture_output=True, text=True, check=True).stdout
    assert bool(report(leave).misplaced) == ("release 12.8" in version)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "factor"), [(1024, 1), (4096, 1), (8192, 1), (131072, 1), (1 << 18, 1),
                                                (1 << 20, 1), (1 << 21, 2), (1 << 22, 15), ((1 << 22) + 16, 1)])
def test_kernels_of_half_precision_on_a_hopper(length, factor):
    check(launched(length, torch.bfloat16), 90, WIDE_MEMORY, factor)


@pytest.mark.slow
def test_columns_of_64_points_in_half_precision_on_a_hopper():
    """Of the plans for less shared memory, which take them."""
    check(launched(1 << 18, torch.bfloat16, wide=False), 90, WIDE_MEMORY)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 4096, 8192, 131072, 1 << 18, 1 << 19, 1 << 20])
def test_kernels_of_float32_on_a_hopper(length):
    check(launched(length, torch.float32), 90, WIDE_MEMORY, factor=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [4096, 131072, 1 << 18])
def test_kernels_on_a_gpu_with_less_shared_memory(length, dtype):
    check(launched(length, dtype, wide=False), 80, NARROW_MEMORY, factor=4)


def in_slices(length: int, dtype: torch.dtype, segmented: bool, order: int) -> list[Launch]:
    """Of the rows that an all-to-all of four ranks delivers, with a gate of order 3, and of what stands around their
    convolutions."""
    slices, here = 4, length // 4
    u, dy, du = (torch.zeros(slices, 2, 2, here, dtype=dtype) for _ in range(3))
    gate, dgate = (torch.zeros(2, 2, length, dtype=dtype) if order > 2 else None for _ in range(2))
    if order > 2:
        u, dy, du = (torch.zeros(2, 2, length, dtype=dtype) for _ in range(3))
    h, direct = torch.zeros(2, length), torch.zeros(2)
    segments = Segments((0, length // 2, length), 2, length) if segmented else None
    p, halo = (torch.zeros(2, order + 1, 2, tokens, dtype=dtype) for tokens in (here, 2))
    positions = torch.zeros(2, here, dtype=torch.int32) if segmented else None
    given = p, halo, torch.zeros(2 * order + 2, 3), torch.zeros(2 * order + 2), positions
    conv = torch.zeros(2, 2, here, dtype=dtype)

    def work() -> None:
        arrived.convolve(u, h, direct, gate, out=du, segments=segments)
        arrived.convolve_backward(dy, u, h, direct, du, gate, dgate, segments=segments)
        across.enter(*given)
        across.leave(*given, conv)
        across.leave_backward(*given, conv, conv.clone())
        across.enter_backward(*given, torch.zeros(order - 1, *conv.shape, dtype=dtype))

    return launches(work)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "segmented", "order"), [
    (8192, False, 2), (8192, True, 2), (131072, False, 2), (2**22 + 64, False, 2), (8192, False, 3), (8192, True, 3),
    (131072, False, 3)])
def test_context_ranks_on_a_hopper(length, segmented, order):
    """The longest go by cuFFT."""
    check(in_slices(length, torch.bfloat16, segmented, order), 90, WIDE_MEMORY, factor=2)


@pytest.mark.slow
def test_third_order_of_context_ranks_on_a_gpu_with_less_shared_memory():
    check([launch for launch in in_slices(8192, torch.bfloat16, True, 3) if launch.name.startswith("across.")], 80,
          NARROW_MEMORY)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 8192, 131072])
def test_segments_and_third_order_on_a_hopper(length):
    """Of segments no load is known to be aligned."""
    check(of_batch(2, length, torch.bfloat16, wide=True, backward=True, order=3), 90, WIDE_MEMORY)
    check(of_batch(2, length, torch.bfloat16, wide=True, backward=True, segmented=True), 90, WIDE_MEMORY, factor=2)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [plan_for(1, precise=False, wide=True), large_plan(9000, 64, 64), None])
def test_everything_of_size_one_is_compiled(plan):
    """Arguments that are 1 become constants, whose operations Triton knows fewer of: one window of one channel and one
    token."""
    one = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    h, direct = torch.zeros(1, 1), torch.zeros(1)

    def work() -> None:
        for order in (2, 3):
            p, short = one.new_zeros(1, order + 1, 1, 1), (torch.zeros(order + 1, 1), torch.zeros(order + 1))
            filters = torch.zeros(order - 1, 1, 1), torch.zeros(order - 1, 1)
            run, given = Operator.whole(p, *short, plan), (p, p[..., :0], *short, None)
            run.mix(*filters)
            run.mix_backward(one.clone(), *filters)
            across.enter(*given)
            across.leave(*given, one)
            across.leave_backward(*given, one.clone(), one.clone())
            across.enter_backward(*given, torch.stack([one] * (order - 1)))
        for u, gate, dgate in ((one[None], None, None), (one, one.clone(), one.clone())):
            arrived.convolve(u, h, direct, gate, out=u.clone(), segments=None)
            arrived.convolve_backward(u.clone(), u, h, direct, u.clone(), gate, dgate, segments=None)

    for launch in launches(work):
        assert not report(launch).serialized
