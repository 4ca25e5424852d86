"""What the check of Triton's kernels runs: its sizes, its references, its launch options.

    python -m benchmarks.gpu.kernel_cases INDEX PROCESSES

compiles this process' part of them, and compares those of CHECKED with float64.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.task import device, median_seconds
from hyena_dist.ops import libraries
from hyena_dist.ops.hyena import HyenaWeights, hyena
from hyena_dist.ops.long_conv import causal_conv_reference
from hyena_dist.ops.segments import Segments
from hyena_dist.ops.triton import groups
from hyena_dist.ops.triton.groups import Operator
from hyena_dist.ops.triton.plans import LargePlan, SmallPlan, large_plan, plan_for

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 6e-3, FP16: 2.5e-3, FP32: 5e-6}
"""2-norms. Of bfloat16 the results' rounding alone makes 1.7e-3."""
ERRORS = "ERRORS "
"""Begins a line of JSON: a case, its errors, and what is allowed."""

Change = Callable[[Any], Any]
Options = tuple[int, bool, dict[str, Change]]


@dataclass(frozen=True)
class Case:
    length: int
    batch: int
    channels: int
    dtype: torch.dtype
    cufft: bool = False
    order: int = 2
    segments: int = 1
    """Of each row, the later ones longer; of row b one more than of row b - 1."""
    kept: bool = False
    """The filters' spectra are kept from the forward pass."""

    def __str__(self) -> str:
        return (f"{self.length:,} x {self.batch} x {self.channels} {str(self.dtype).removeprefix('torch.')}"
                f"{' cufft' if self.cufft else ''}{f' order {self.order}' if self.order > 2 else ''}"
                f"{f' {self.segments} segments' if self.segments > 1 else ''}{' kept spectra' if self.kept else ''}")

    def offsets(self) -> list[list[int]]:
        """Of the segments of every row."""
        counts = [self.segments + (b if self.segments > 1 else 0) for b in range(self.batch)]
        return [[self.length * i * i // count**2 for i in range(count + 1)] for count in counts]


CHECKED = (
    Case(8191, 2, 3, BF16), Case(8192, 3, 2, FP16), Case(8191, 1, 1, FP32), Case(4096, 2, 2, BF16),
    Case(1021, 5, 2, BF16), Case(1024, 2, 1, FP32), Case(131071, 2, 2, BF16), Case(131072, 1, 1, FP32),
    Case(262144, 1, 2, BF16), Case(524288, 2, 1, BF16),
    Case(1000003, 1, 2, BF16), Case(1000003, 1, 1, FP32), Case(1048576, 2, 3, BF16), Case(1048576, 1, 1, BF16),
    Case(2097152, 1, 1, BF16), Case(4194304, 1, 1, BF16), Case(1000003, 2, 2, BF16, cufft=True),
    Case(1048576, 1, 1, FP32, cufft=True),
    Case(8191, 2, 2, BF16, order=3), Case(131071, 2, 2, BF16, order=3), Case(1021, 1, 2, FP32, order=3),
    Case(8191, 2, 2, BF16, segments=7), Case(131071, 2, 2, BF16, segments=3), Case(4096, 2, 2, FP32, segments=5),
    Case(131071, 2, 2, BF16, order=3, kept=True), Case(1048576, 1, 2, BF16, kept=True),
)
REPEATED = (Case(8192, 64, 8, BF16), Case(131072, 8, 4, BF16), Case(1048576, 2, 4, BF16))
TIMED = (Case(8192, 2, 2, BF16), Case(1 << 20, 1, 2, BF16), Case(131072, 2, 2, BF16), Case(1024, 2, 2, BF16),
         Case(131072, 2, 2, FP32), Case(4096, 2, 2, FP32))


def with_options(part: str, **options: Any) -> Change:
    """Another launch of one kernel of a plan; None takes an option away."""
    def change(plan: SmallPlan | LargePlan) -> SmallPlan | LargePlan:
        merged = getattr(plan, part) | options
        return replace(plan, **{part: {key: value for key, value in merged.items() if value is not None}})
    return change


def rows_of(length: int, r1: int, r2: int) -> Change:
    return lambda _: large_plan(length, r1, r2)


def unchanged(plan: Any) -> Any:
    return plan


def group_of(elements: int) -> Change:
    """Groups of channels of another size; `changed` takes them back."""
    def change(plan: Any) -> Any:
        groups.GROUP_ELEMENTS = elements
        return plan
    return change


def registers(part: str, *numbers: int) -> dict[str, Change]:
    return {"as it is": unchanged} | {f"{n} registers": with_options(part, maxnreg=n) for n in numbers}


GROUPS = {f"2^{n}": group_of(2**n) for n in (22, 23, 24, 25, 26, 27)}
OPTIONS: dict[str, Options] = {
    "forward of one kernel": (8192, False, registers("forward", 128, 168)),
    "forward of one kernel, 64 rows": (4096, False, registers("forward", 128, 168)),
    "backward of one kernel": (8192, True, registers("backward", 168)),
    "rows": (1 << 20, False, registers("rows", 128, 168)),
    "rows, 64": (131072, False, registers("rows", 128, 168)),
    "last columns": (1 << 20, False, {
        "32 columns": unchanged, "64": with_options("leave", BC=64), "16": with_options("leave", BC=16),
        "64, 128 registers": with_options("leave", BC=64, maxnreg=128)}),
    "last columns backward": (1 << 20, True, {
        "32 columns": unchanged, "64": with_options("leave_backward", BC=64),
        "32, 128 registers": with_options("leave_backward", BC=32, maxnreg=128),
        "16": with_options("leave_backward", BC=16)}),
    "rows of 8192 or 4096, forward": (1 << 20, False, {"8192": unchanged, "4096": rows_of(1 << 20, 64, 64)}),
    "rows of 8192 or 4096, backward": (1 << 20, True, {"8192": unchanged, "4096": rows_of(1 << 20, 64, 64)}),
    "rows of 4096 or 8192, backward": (131072, True, {"4096": unchanged, "8192": rows_of(131072, 128, 64)}),
    "groups, forward": (1 << 20, False, GROUPS),
    "groups, backward": (1 << 20, True, GROUPS),
    "groups, backward, short": (8192, True, GROUPS),
}


def every() -> list[tuple[Case, Change]]:
    """All that has to be compiled, what takes longest first."""
    options = [(Case(length, 2, 2, BF16), change) for length, _, variants in OPTIONS.values()
               for label, change in variants.items() if change is not unchanged and not label.startswith("2^")]
    return options + [(case, unchanged) for case in (*TIMED, *CHECKED, *REPEATED)]


def inputs(case: Case) -> list[Tensor]:
    """p, dy, weight, bias, h, direct."""
    torch.manual_seed(case.length)
    where, length = device(), case.length
    h = torch.randn(case.order - 1, case.channels, length, device=where)
    h *= torch.exp(-torch.arange(length, device=where) / (length / 5))
    shapes = (case.batch, case.order + 1, case.channels, length), (case.batch, case.channels, length)
    p, dy = (torch.randn(shape, device=where, dtype=case.dtype) for shape in shapes)
    rows = (case.order + 1) * case.channels
    return [p, dy, torch.randn(rows, 3, device=where), torch.randn(rows, device=where), h,
            torch.randn(case.order - 1, case.channels, device=where)]


def operator(case: Case, p: Tensor, given: list[Tensor], change: Change = unchanged) -> Operator:
    """What computes this case."""
    if case.segments > 1:
        segments = Segments(case.offsets(), case.batch, case.length)
        places, sizes = segments.by_size(p.device)
        return Operator.in_segments(p, *given[2:4], places, segments.positions(p.device).int(), sizes,
                                    lambda size: plan_for(size, case.dtype == FP32, True))
    plan = None if case.cufft else plan_for(case.length, case.dtype == FP32, True)
    return Operator.whole(p, *given[2:4], plan and change(plan))


@contextlib.contextmanager
def changed(case: Case, p: Tensor, given: list[Tensor], change: Change) -> Iterator[Operator]:
    kept = groups.GROUP_ELEMENTS
    try:
        yield operator(case, p, given, change)
    finally:
        groups.GROUP_ELEMENTS = kept


def both_directions(case: Case, given: list[Tensor], change: Change = unchanged) -> dict[str, Tensor]:
    p, dy = given[0].clone(), given[1].clone()
    with changed(case, p, given, change) as found:
        y = found.mix_and_keep(*given[4:])[0] if case.kept else found.mix(*given[4:])
        grads = found.mix_backward(dy, *given[4:])
    return dict(zip(("y", "dp", "dweight", "dbias", "dh", "ddirect", "y again"), (y, p, *grads, dy), strict=True))


def reference(case: Case, given: list[Tensor]) -> dict[str, Tensor]:
    """By torch in float64, segment by segment."""
    p, dy, *weights = given
    leaves = [t.double().requires_grad_() for t in (p.flatten(1, 2), *weights)]
    y = torch.cat([torch.cat([_one_segment(row[None, :, start:stop], *leaves[1:]) for start, stop in pairwise(edges)],
                             dim=2) for row, edges in zip(leaves[0], case.offsets(), strict=True)])
    grads = torch.autograd.grad(y, leaves, dy.double())
    y = y.detach()
    return {"y": y, "y again": y, "dp": grads[0].view(p.shape), "dweight": grads[1], "dbias": grads[2], "dh": grads[3],
            "ddirect": grads[4]}


def _one_segment(x: Tensor, taps: Tensor, bias: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    length = x.shape[-1]
    q = bias[:, None] + sum(F.pad(x, (j, 0))[..., :length] * taps[:, -1 - j, None] for j in range(taps.shape[1]))
    *gates, u = q.chunk(len(h) + 2, dim=1)
    u = u * gates.pop()
    for filters, b in zip(h, direct, strict=True):
        u = causal_conv_reference(u, filters[:, :length], b, gates.pop())
    return u


def relative(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b).norm() / b.norm())
    return error if error == error else float("inf")


def plain_times(given: list[Tensor], library: str | None = None) -> dict[str, float]:
    """Of gates and convolution by torch.fft through autograd, or by a library (`ops.libraries`), without the short
    convolution. Seconds."""
    p, dy, _, _, h, direct = given
    leaves = [t.detach().requires_grad_() for t in (*p.unbind(1), h, direct)]
    convolve = library and libraries.convolve_by(library, p.shape[-1], p.dtype, p.device)

    def forward() -> Tensor:
        x0, x1, v, filters, bias = leaves
        if convolve:
            return x0 * (convolve(x1 * v, filters[0]) + bias.to(p.dtype)[0, :, None] * (x1 * v))
        return causal_conv_reference(x1 * v, filters[0], bias[0], x0)

    with torch.no_grad():
        seconds = median_seconds(forward, rounds=3, warm=1)
    both = median_seconds(lambda: torch.autograd.grad(forward(), leaves, dy), rounds=3, warm=1)
    return {"forward": seconds, "backward": both - seconds}


def mixer_seconds(length: int, batch: int, channels: int, backend: str) -> tuple[float, float]:
    """(forward, backward) of `hyena` under bf16 autocast."""
    where = device()
    shapes = [(3 * channels, channels), (3 * channels,), (3 * channels, 3), (3 * channels,), (1, channels, length),
              (1, channels), (channels, channels), (channels,)]
    weights = HyenaWeights(*(torch.randn(shape, device=where).mul_(0.05).requires_grad_() for shape in shapes))
    x = torch.randn(length, batch, channels, device=where, requires_grad=True)
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.autocast(where.type, torch.bfloat16):
            return hyena(x, weights, backend=backend)

    with torch.no_grad():
        seconds = median_seconds(forward, rounds=3)
    both = median_seconds(lambda: torch.autograd.grad(forward(), [x, *weights], dy), rounds=3)
    return seconds, both - seconds


def main(index: int, processes: int) -> None:
    for case, change in every()[index::processes]:
        try:
            if case in CHECKED:
                given = inputs(case)
                want, found = reference(case, given), both_directions(case, given)
                errors = {name: relative(found[name], want[name]) for name in want}
                print(ERRORS + json.dumps({"case": str(case), "errors": errors, "allowed": TOLERANCE[case.dtype]}),
                      flush=True)
            else:
                small = replace(case, channels=2, batch=min(case.batch, 2))
                both_directions(small, inputs(small), change)
                float(torch.ones(1, device=device()).sum())  # what failed on the device is said here
        except Exception as error:  # noqa: BLE001 - the others are to be tried too
            traceback.print_exc()
            print(f"FAILED {case}: {type(error).__name__}: {' '.join(str(error).split())[:150]}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
