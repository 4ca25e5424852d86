"""Triton's kernels on a GPU: compiled in parallel, against float64 at real sizes, twenty runs equal bit for bit, then
their times, of other launch options too, beside torch's operations and a plain torch.fft convolution."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import kernel_cases as cases
from benchmarks.gpu.measure import forget_peak, kernels, peak_bytes
from benchmarks.gpu.task import Task, median_seconds
from hyena_dist.ops import libraries
from hyena_dist.ops.mix import Asked

COMPILE_SECONDS = 75.0
PROCESSES = 14
RUNS = 20
CHANNELS = 256
TOKENS = 1 << 20
"""Batch x length of what is timed."""
OPTION_CHANNELS = 64
TIMED = ((8192, torch.bfloat16), (1 << 20, torch.bfloat16), (131072, torch.bfloat16), (1024, torch.bfloat16),
         (131072, torch.float32), (4096, torch.float32))


def run(task: Task) -> None:
    if task.tiny:
        task.note("Triton's kernels need a GPU: on a CPU its interpreter runs them, in tests/unit/test_triton.py")
        return
    task.attempt("compile and check", lambda: compile_and_check(task))
    for case in cases.REPEATED:
        task.attempt(f"{case} repeated", lambda case=case: repeat(task, case))
    forget_peak()
    for length, dtype in TIMED:
        if task.left() > 15:
            task.attempt(f"times at {length:,}", lambda l=length, d=dtype: times(task, l, d))
            forget_peak()
    for name, options in cases.OPTIONS.items():
        if task.left() > 8:
            task.attempt(name, lambda name=name, options=options: try_options(task, name, options))
            forget_peak()
    if task.left() > 20:
        task.attempt("mixer", lambda: mixer(task))


def compile_and_check(task: Task) -> None:
    """Every kernel that is launched below, in processes beside each other, which share Triton's cache: one that fails
    takes its own process with it."""
    started = time.monotonic()
    running = []
    for i in range(PROCESSES):
        log = (task.work / f"compile-{i}.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.gpu.kernel_cases", str(i), str(PROCESSES)]
        running.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                         env=os.environ | {"OMP_NUM_THREADS": "1"}), log))
    failed, right = [], 0
    for process, log in running:
        try:
            process.wait(max(0.1, COMPILE_SECONDS - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            failed.append("FAILED to be compiled in time")
        log.seek(0)
        for line in log.read().splitlines():
            if line.startswith(cases.ERRORS):
                right += _judged(task, json.loads(line.removeprefix(cases.ERRORS)))
            elif line.startswith("FAILED"):
                failed.append(line)
    task.note(f"compiled {len(cases.every())} configurations in {time.monotonic() - started:.0f} s, {len(failed)} "
              f"failed; values and every gradient right in {right} of {len(cases.CHECKED)} cases",
              ok=not failed and right == len(cases.CHECKED), failed=failed)
    for line in failed[:6]:
        task.note(f"  {line[:190]}")


def _judged(task: Task, found: dict[str, Any]) -> bool:
    """Note the errors of a case, 2-norms; whether it is right."""
    allowed, sums = found["allowed"], ("dweight", "dbias", "ddirect")
    right = all(error < (10 if name in sums else 1) * allowed for name, error in found["errors"].items())
    line = f"{found['case']}: " + " ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
    task.note("" if right else line, ok=right, **found)
    return right


def repeat(task: Task, case: cases.Case) -> None:
    given = cases.inputs(case)
    first = cases.both_directions(case, given)
    different = sum(not all(torch.equal(first[name], again[name]) for name in first)
                    for again in (cases.both_directions(case, given) for _ in range(RUNS - 1)))
    task.note(f"{case}: {RUNS} runs, {different} different", ok=not different)


def times(task: Task, length: int, dtype: torch.dtype) -> None:
    """Forward and backward of the operator between its products, and of a plain convolution by torch.fft."""
    case = cases.Case(length, TOKENS // length, CHANNELS, dtype)
    given = cases.inputs(case)
    p, dy = given[0].clone(), given[1].clone()
    forget_peak()
    before = torch.cuda.memory_allocated()
    found = cases.operator(case, p, given)
    work = {"forward": partial(found.mix, *given[4:]), "backward": partial(found.mix_backward, dy, *given[4:])}
    sides: dict[str, float] = {name: median_seconds(call, rounds=5) for name, call in work.items()}
    sides["GiB"] = (peak_bytes()[0] - before) / 2**30
    profiles = {name: kernels(call).by_name[:12] for name, call in work.items()}
    del found, work, p, dy
    forget_peak()
    plain: dict[str, float] = {}
    rivals: dict[str, float] = {}
    task.attempt(f"torch.fft at {length:,}", lambda: plain.update(cases.plain_times(given)))
    for name in libraries.PACKAGES:
        asked = Asked(given[0].device, dtype, order=2, taps=3, length=length)
        if libraries.installed(name) and not libraries.refusal(name, asked):
            task.attempt(f"{name} at {length:,}", lambda name=name: rivals.update(
                {f"{name} {part}": seconds for part, seconds in cases.plain_times(given, name).items()}))
            forget_peak()
    ratio = sum(plain.values()) / (sides["forward"] + sides["backward"]) if plain else float("nan")
    label = f"{length:,} x {case.batch} x {CHANNELS} {str(dtype)[6:]}"
    others = ", ".join(f"{n} {s * 1e3:.1f}" for n, s in (plain | rivals).items())
    task.note(f"{label}: forward {sides['forward'] * 1e3:.2f}, backward {sides['backward'] * 1e3:.2f} ms, "
              f"{sides['GiB']:.1f} GiB; torch.fft {others} ms: {ratio:.1f} times", case=str(case), sides=sides,
              plain=plain, rivals=rivals, profiles=profiles)
    for name in profiles:
        task.note("  " + name + ": " + ", ".join(f"{n.split('(')[0].removeprefix('void ')[:20]} {s * 1e3:.2f}"
                                                 for n, _, s in profiles[name][:7]))


def try_options(task: Task, name: str, options: "cases.Options") -> None:
    """One direction at a few launch options, the others as they are."""
    length, backward, variants = options
    case = cases.Case(length, max(1, TOKENS // length), OPTION_CHANNELS, torch.bfloat16)
    given = cases.inputs(case)
    found: dict[str, float] = {}
    for label, change in variants.items():
        def work(change: Callable = change) -> object:
            with cases.changed(case, given[0], given, change) as run:
                return run.mix_backward(given[1], *given[4:]) if backward else run.mix(*given[4:])
        try:
            found[label] = median_seconds(work, rounds=5, at_most=1.0) * 1e3
        except Exception as error:  # noqa: BLE001 - another option may work
            found[label] = float("nan")
            print(name, label, error, flush=True)
    task.note(f"{name} at {length:,}, {OPTION_CHANNELS} channels, ms: "
              + ", ".join(f"{label} {value:.3f}" for label, value in found.items()), options=found)


def mixer(task: Task) -> None:
    """The whole operator with its products, by both backends."""
    for length in (1 << 20, 8192):
        found = {backend: cases.mixer_seconds(length, TOKENS // length, CHANNELS, backend)
                 for backend in ("torch", "triton")}
        task.note(f"mixer {CHANNELS} at {length:,} bf16: " + ", ".join(
            f"{backend} {forward * 1e3:.1f} + {backward * 1e3:.1f} ms" for backend, (forward, backward)
            in found.items()), mixer=found, length=length)
        forget_peak()

