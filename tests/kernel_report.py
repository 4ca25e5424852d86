"""Compiles the kernels that a function launches for a GPU that need not be there: registers, spills and shared memory
by ptxas, kinds of dots and whether they read what they should."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from tests.machine_code import listing, misplaced_operand

PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would specialise it for its arguments."""

    function: JITFunction
    types: tuple[tuple[str, str], ...]
    """(argument, type) of all; constants are "constexpr"."""
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    """Arguments that are multiples of 16: loads of 16 bytes rest on it."""
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"


@dataclass(frozen=True)
class Report:
    """Of one compilation."""

    registers: int
    spilled: int
    """Bytes of spill stores for each thread."""
    shared: int
    """Bytes of shared memory for each program."""
    wgmma: int
    mma: int
    wide_loads: int
    """Loads of 16 bytes."""
    wide_stores: int
    """Stores of 16 bytes."""
    serialized: bool
    """ptxas had too few registers for asynchronous dots."""
    misplaced: str
    """The first operand of an asynchronous dot that is not known to lie in the program's shared memory."""


def launches(work: Callable[[], object]) -> list[Launch]:
    """The different launches of a call, in which nothing is launched: what kernels make is not made."""
    found: dict[Launch, None] = {}
    with _recorded(lambda launch: found.setdefault(launch)):
        work()
    return list(found)


@contextlib.contextmanager
def _recorded(note: Callable[[Launch], object]) -> Iterator[None]:
    def run(function: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        names = function.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        note(_launch(function, given, options))

    kept, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = kept


def _launch(function: JITFunction, given: dict[str, Any], options: dict[str, Any]) -> Launch:
    types, constants, divisible = [], [], []
    for parameter in function.params:
        value, name = given[parameter.name], parameter.name
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            types.append((name, "constexpr"))
            constants.append((name, value))
            continue
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        types.append((name, TYPES[value.dtype] if isinstance(value, torch.Tensor)
                      else "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"))
        if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
            divisible.append(name)
    return Launch(function, tuple(types), tuple(constants), tuple(divisible), tuple(options.items()))


def compiled(launch: Launch, capability: int = 90) -> CompiledKernel:
    """For capability 80 or 90."""
    places = {name: i for i, name in enumerate(launch.function.arg_names)}
    source = ASTSource(launch.function, dict(launch.types), constexprs=dict(launch.constants),
                       attrs={(places[name],): [["tt.divisibility", 16]] for name in launch.divisible})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def report(launch: Launch, capability: int = 90) -> Report:
    """Compile for capability 80 or 90."""
    kernel = compiled(launch, capability)
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        log = subprocess.run([PTXAS, "-v", f"--gpu-name={name}", path, "-o", path.with_suffix(".o")],
                             capture_output=True, text=True, check=True).stderr
        code = listing(kernel.asm["cubin"], Path(place))
    threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared

    def number(pattern: str) -> int:
        return int(re.search(pattern, log)[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return Report(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), shared,
                  count(r"wgmma\.mma_async"), count(r"\bmma\.sync\.aligned"), count(r"ld\.global[\w.:]*\.v4"),
                  count(r"st\.global[\w.:]*\.v4\.b32"), "serialized" in log, misplaced_operand(code, threads, shared))
