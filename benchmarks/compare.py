"""Compares sides that compute the same: their time and memory, and their errors against float64, without which nothing
is reported."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_tensor_bytes
from benchmarks.timing import Times, interleaved, ratio

TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "fp16": 1e-2}
"""Of max|a - b| / max|b| of our sides, by the precision of the inputs and products. A longer sum rounds more: what is
no more than twice as wrong as another side is not wrong."""
YARDSTICK_TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}
"""The same of what we are compared with: plain code sums gradients over all tokens in one run, and is wrong by 7e-4 at
262144 tokens in float32, which its row says."""

OURS, BASELINE = "ours", "baseline"
VALUE = "value"
CHECK = "float64 check"
PROBES = (1024, 2048)
"""Lengths from which memory is estimated."""
NO_ROOM = "does not fit into the device's memory"


class WrongValues(ValueError):
    """A side computes something else: its time is worth nothing."""


Results = Callable[[], dict[str, Tensor]]
"""Collects what a pass computed, after the clock has stopped: `VALUE`, and gradients by name."""
Side = Callable[[Any], Results]
"""A forward and backward pass on the inputs of a round."""


@dataclass(frozen=True)
class Measured:
    """One side and what it is held against."""

    run: Side
    exact: Side
    """The same in float64; sides that compute the same share it."""
    tolerance: float
    bytes: float
    """That a forward and backward pass must move through memory at least, by formula."""


@dataclass(frozen=True)
class Case:
    """Sides that do the same work at one length."""

    length: int
    batch: int
    inputs: Callable[[int], Any]
    """Of a round: fresh, random, the same for every side."""
    sides: dict[str, Measured]
    """Ratios are to the first one."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Sides that are not measured, and why."""


@dataclass(frozen=True)
class Row:
    """One side at one length; medians over the rounds. None: not measured."""

    length: int
    batch: int
    side: str
    seconds: float | None = None
    ratio: float | None = None
    """This side's time over the first side's, round by round: more than 1 is slower than that."""
    cpu_seconds: float | None = None
    """Of all threads of the process."""
    cpu_ratio: float | None = None
    ns_per_token: float | None = None
    peak_tensor_bytes: int | None = None
    formula_bytes: float | None = None
    """That must be moved through memory at least."""
    copy_share: float | None = None
    """Those bytes per second, over what a plain copy reaches on this device in the same run."""
    value_error: float | None = None
    """Against float64: max|a - b| / max|b|."""
    gradient_error: float | None = None
    """The largest of any gradient's."""
    note: str = ""


def compare(case: Case, *, rounds: int, device: torch.device, copy_bytes_per_second: float) -> list[Row]:
    """Measure every side's memory, then time them all, then check what they computed. One that does not fit into the
    device's memory has a row that says so.

    The passes in float64 come last: they leave a CPU's allocator with pages that a training process does not have, and
    that some sides need more than others.

    Raises:
        WrongValues: nothing is to be reported.
    """
    skipped, peaks, found = dict(case.skipped), {}, {}
    inputs = case.inputs(0)
    for name, side in case.sides.items():
        try:
            with peak_tensor_bytes(device) as peak:
                collect = side.run(inputs)
        except torch.OutOfMemoryError:
            skipped[name] = NO_ROOM
            continue
        peaks[name], found[name] = peak.bytes, collect()
        del collect
    times = interleaved({name: case.sides[name].run for name in peaks}, case.inputs, rounds=rounds, device=device)
    errors = _errors(case, found, inputs)
    refuse_wrong(case, errors)
    base = next(iter(times.values()), None)
    rows = [_row(case, name, times[name], base, errors[name], peaks[name], device, copy_bytes_per_second)
            for name in times]
    return rows + [Row(case.length, case.batch, name, note=why) for name, why in skipped.items()]


def _errors(case: Case, found: Mapping[str, dict[str, Tensor]], inputs: Any) -> dict[str, dict[str, float]]:
    """Of every side's results against those of its float64; none where that does not fit into the device's memory."""
    references: dict[int, dict[str, Tensor] | None] = {}
    errors = {}
    for name, results in found.items():
        exact = case.sides[name].exact
        if id(exact) not in references:
            references[id(exact)] = _in_float64(exact, inputs)
        reference = references[id(exact)]
        errors[name] = {} if reference is None else differences(results, reference)
    return errors


def _in_float64(exact: Side, inputs: Any) -> dict[str, Tensor] | None:
    try:
        return exact(inputs)()
    except torch.OutOfMemoryError:
        return None


def differences(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """max|a - b| / max|b| of every quantity; infinite where one is missing or not a number."""
    errors = {}
    for name, reference in exact.items():
        if name not in found or found[name].shape != reference.shape:
            errors[name] = float("inf")
            continue
        error = float((found[name].double() - reference).abs().max() / reference.abs().max())
        errors[name] = error if error >= 0 else float("inf")
    return errors


def refuse_wrong(case: Case, errors: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a quantity that is wrong by more than its side's tolerance, and by more than twice what the most exact of
    the other sides is.

    Raises:
        WrongValues: there is one.
    """
    for name, found in errors.items():
        side = case.sides[name]
        others = [other for key, other in errors.items() if key != name and case.sides[key].exact is side.exact]
        for quantity, error in found.items():
            allowed = max(side.tolerance, 2 * min((other[quantity] for other in others if other), default=0.0))
            if not error <= allowed:
                raise WrongValues(f"{name} at length {case.length}: {quantity} is wrong by {error:.1e}, tolerance "
                                  f"{allowed:.1e}")


def _row(case: Case, name: str, mine: Times, base: Times, errors: Mapping[str, float], peak: int,
         device: torch.device, copy_bytes_per_second: float) -> Row:
    on_cpu, must_move, gradients = device.type == "cpu", case.sides[name].bytes, set(errors) - {VALUE}
    return Row(
        case.length, case.batch, name, seconds=mine.seconds, ratio=ratio(mine.wall, base.wall),
        cpu_seconds=mine.cpu_seconds if on_cpu else None, cpu_ratio=ratio(mine.cpu, base.cpu) if on_cpu else None,
        ns_per_token=1e9 * mine.seconds / (case.batch * case.length), peak_tensor_bytes=peak, formula_bytes=must_move,
        copy_share=must_move / mine.seconds / copy_bytes_per_second, value_error=errors.get(VALUE),
        gradient_error=max((errors[key] for key in gradients), default=None),
        note="" if errors else f"not checked: float64 {NO_ROOM}")


def growth(rows: Sequence[Row], side: str) -> float | None:
    """How much a side's time per token grows from the shortest to the longest length, over how much log L does: 1 is
    the growth of L log L. None where it was not measured at two lengths."""
    measured = {row.length: row.ns_per_token for row in rows if row.side == side and row.ns_per_token}
    if len(measured) < 2:
        return None
    first, last = min(measured), max(measured)
    return measured[last] / measured[first] / (math.log(last) / math.log(first))


def estimated_peaks(case_of: Callable[[int], Case], length: int, device: torch.device) -> dict[str, float]:
    """Peak tensor bytes of every side, and of the check in float64, at a length at which nothing is run: on a line
    through two short ones. More than the truth for what bounds its workspace."""
    short, long = min(PROBES[0], length // 2), min(PROBES[1], length)
    low, high = (_peaks(case_of(probe), device) for probe in (short, long))
    return {name: low[name] + (high[name] - low[name]) / (long - short) * (length - short) for name in high}


def _peaks(case: Case, device: torch.device) -> dict[str, float]:
    inputs, found = case.inputs(0), {}
    sides = {name: side.run for name, side in case.sides.items()}
    for name, run in {**sides, CHECK: next(iter(case.sides.values())).exact}.items():
        with peak_tensor_bytes(device) as peak:
            run(inputs)
        found[name] = peak.bytes
    return found
