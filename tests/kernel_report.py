"""Compiles kernels for a GPU that need not be there: registers, spills and shared memory by ptxas, kinds of dots."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"


@dataclass(frozen=True)
class Kernel:
    """A kernel and how it is launched. `types` are of its run-time arguments: of 16-bit tensors "*bf16", and so on."""

    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


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
    serialized: bool
    """ptxas had too few registers for asynchronous dots."""


def report(kernel: Kernel, capability: int = 90) -> Report:
    """Compile for capability 80 or 90, all pointers and sizes divisible by 16 but those that are not specialised."""
    function = kernel.function
    names = function.arg_names
    signature = {name: "constexpr" if name in kernel.constants else kernel.types[name] for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                 if name not in kernel.constants and signature[name] != "fp32"
                 and not function.params[i].do_not_specialize}
    source = ASTSource(function, signature, constexprs=dict(kernel.constants), attrs=divisible)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **kernel.options}
    if kernel.maxnreg:
        options["maxnreg"] = kernel.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        log = subprocess.run([PTXAS, "-v", f"--gpu-name={name}", path, "-o", path.with_suffix(".o")],
                             capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, log)[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return Report(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), compiled.metadata.shared,
                  count(r"wgmma\.mma_async"), count(r"\bmma\.sync\.aligned"), count(r"ld\.global[\w.:]*\.v4"),
                  "serialized" in log)
