"""Which code computes the Hyena operator between its two products, the second of these, and the norms, the MLP and the
implicit filters around it: torch's operations, or Triton's kernels (`ops.triton`) where they can; of the operator's
long convolutions also libraries (`ops.libraries`)."""

import importlib.util
import logging
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.ops import BACKENDS
from hyena_dist.ops.libraries import PACKAGES, Library, installed
from hyena_dist.ops.mix import Asked, Backend
from hyena_dist.ops.triton.plans import MOST_TAPS, measured

_HOPPER = (9, 0)

# `auto` takes Triton's kernels of a module only on kinds of device (capabilities) and in dtypes in which they were
# measured and checked.
_MEASURED: dict[str, frozenset[tuple[tuple[int, int], torch.dtype]]] = {
    "operator": frozenset({(_HOPPER, torch.bfloat16)}),
    "norm": frozenset({(_HOPPER, torch.float32)}),
    "mlp": frozenset(),
    "project": frozenset(),
    "gelu": frozenset({(_HOPPER, torch.bfloat16), (_HOPPER, torch.float16), (_HOPPER, torch.float32)}),
    "filter": frozenset({(_HOPPER, torch.float32)}),
    "arrived": frozenset(),
    "across": frozenset(),
}

MOST_CHANNELS = 4096
MOST_FILTER_WIDTH = 128
MOST_KEPT_CHANNELS = 256
"""That the kernels of a whole MLP and of the operator's last product keep on the chip."""
LEAST_CAPABILITY = (8, 0)
NO_FLOAT64 = "the kernels have no float64"

logger = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot be had, before anything runs.

    Raises:
        ValueError: unknown.
        ConfigError: Triton or a library is asked for and not installed; a ValueError, too.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ops.backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not _installed():
        raise ConfigError("ops.backend=triton needs Triton, which is not installed: pip install 'hyena-dist[kernels]', "
                          "or take ops.backend=torch")
    if backend in PACKAGES and not installed(backend):
        raise ConfigError(f"ops.backend={backend} needs {PACKAGES[backend][1]}, which is not installed: install it "
                          f"(docs/performance.md), or take ops.backend=torch")


def mix_kernels(backend: str, asked: Asked) -> Backend | None:
    """`ops.triton.operator` or a library's backend, if it is to compute `mix`; None: torch does. Where one was asked
    for and cannot, the log says why, once for each reason.

    Raises:
        ValueError: as `check_backend`.
    """
    if backend in PACKAGES:
        return _library(backend, asked)
    if backend == "auto" and not (measured(asked.length) and asked.order == 2 and not asked.segmented):
        return None
    kernels: Any = _chosen("operator", backend, asked.device, asked.dtype, None)
    reason = kernels and kernels.refusal(asked)
    if reason and backend == "triton":
        say_once(reason)
    if reason or kernels is None:
        return None
    keeps = backend == "triton" and torch.is_grad_enabled()  # which was not measured
    return keeps and kernels.keeping(asked) or kernels


def _library(name: str, asked: Asked) -> Backend | None:
    check_backend(name)
    library = Library(name, asked.dtype)
    if reason := library.refusal(asked):
        say_once(reason, name)
        return None
    return library


def slice_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`ops.triton.arrived`, if it is to convolve the rows that an all-to-all delivers in `dtype`; None: torch does, as
    above."""
    return _chosen("arrived", backend, device, dtype, None)


def across_kernels(backend: str, asked: Asked) -> ModuleType | None:
    """`ops.triton.across`, if it is to compute what stands around the convolutions of a slice of the tokens; None:
    torch does, as above."""
    reason = None
    if asked.taps > MOST_TAPS:
        reason = f"the kernels take short convolutions of at most {MOST_TAPS} taps, got {asked.taps}"
    return _chosen("across", backend, asked.device, asked.dtype, reason)


def norm_kernels(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> ModuleType | None:
    """`ops.triton.norm`, if it is to compute layer norms over `channels` in `dtype`; None: torch does, as above."""
    reason = None if channels <= MOST_CHANNELS else f"the norm's kernels take at most {MOST_CHANNELS:,} channels"
    return _chosen("norm", backend, device, dtype, reason)


def mlp_kernels(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> ModuleType | None:
    """`ops.triton.mlp`, if it is to compute MLPs over `channels` with products of `dtype`; None: torch multiplies, and
    `gelu_kernels` says what is between the products."""
    if dtype.itemsize > 2 or channels > MOST_KEPT_CHANNELS:
        return None
    return _chosen("mlp", backend, device, dtype, None)


def project_kernels(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> ModuleType | None:
    """`ops.triton.project`, if it is to compute the operator's last product, of `dtype`, to so many channels; None:
    torch does."""
    if dtype.itemsize > 2 or channels > MOST_KEPT_CHANNELS:
        return None
    return _chosen("project", backend, device, dtype, None)


def gelu_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`ops.triton.gelu`, if it is to compute GELU of `dtype`; None: torch does, as above."""
    return _chosen("gelu", backend, device, dtype, None)


def filter_kernels(backend: str, weight: Tensor, last_weight: Tensor) -> ModuleType | None:
    """`ops.triton.filter`, if it is to compute an implicit filter of this first weight [F, E] and this last one; None:
    torch does, as above."""
    width, features = weight.shape
    reason = None
    if width > MOST_FILTER_WIDTH or features > MOST_FILTER_WIDTH:
        reason = f"the filter's kernels take a width and features of at most {MOST_FILTER_WIDTH}"
    elif weight.dtype.itemsize == 2:
        reason = "the filter's kernels are of float32"
    dtype = torch.promote_types(weight.dtype, last_weight.dtype)
    return _chosen("filter", backend, weight.device, dtype, reason)


def _chosen(module: str, backend: str, device: torch.device, dtype: torch.dtype, reason: str | None) -> Any:
    """A module of `ops.triton`, or None: torch was asked for, `auto` does not take it on this device, or it cannot, of
    which `reason` may name a cause."""
    check_backend(backend)
    if backend == "torch" or backend in PACKAGES or (backend == "auto" and not (
            (_capability(device), dtype) in _MEASURED[module] and _installed())):
        return None
    reason = reason or _refusal(device, dtype)
    if reason is not None:
        if backend == "triton":
            say_once(reason)
        return None
    # Triton is optional, and imported only where it is used
    return importlib.import_module(f"hyena_dist.ops.triton.{module}")


@lru_cache
def say_once(reason: str, backend: str = "triton") -> None:
    """Log that torch does the work of another backend, and why."""
    logger.warning("ops.backend=%s: torch does its work here: %s", backend, reason)


def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return NO_FLOAT64
    if device.type != "meta" and not _interpreted():  # on meta tensors a GPU's step is counted
        capability = _capability(device)
        if capability is None:
            return f"the kernels run on CUDA, not on {device.type}"
        if capability < LEAST_CAPABILITY:
            return f"the kernels need a GPU of capability 8.0, this one has {'.'.join(map(str, capability))}"
    return None


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on a CPU: for tests."""
    import triton
    return triton.knobs.runtime.interpret
