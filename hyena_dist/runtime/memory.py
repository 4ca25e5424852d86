"""How much memory a process has held."""

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: "torch.device") -> int:
    """The most memory that this process has held at a time: allocations of a CUDA device, else the resident set.

    On Linux the kernel's own mark of the process is read. That of `getrusage` is not reset when a new program begins,
    so that a small process which a large one has started reads as large as that one.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
