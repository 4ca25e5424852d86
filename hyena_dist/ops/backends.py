"""Which code computes the Hyena operator between its two products: torch's operations (`ops.hyena`), or Triton's
kernels (`ops.triton`) where they can."""

import importlib.util
import logging
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")

# `auto` takes Triton only on kinds of device (capabilities) on which its kernels were measured and checked: none yet.
_MEASURED: frozenset[tuple[int, int]] = frozenset()

MOST_TAPS = 8
LEAST_CAPABILITY = (8, 0)

logger = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot be had, before anything runs.

    Raises:
        ValueError: unknown, or Triton is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ops.backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("ops.backend=triton needs Triton, which is not installed: pip install 'hyena-dist[kernels]', "
                         "or take ops.backend=torch")


def kernels_for(backend: str, device: torch.device, dtype: torch.dtype, filters: Tensor,
                taps: int) -> ModuleType | None:
    """`ops.triton.operator`, if it is to compute the operator of a projection of this dtype, filters [N - 1, C, L] and
    a short convolution of `taps`; None: torch does. Where Triton was asked for and cannot, the log says why, once for
    each reason.

    Raises:
        ValueError: as `check_backend`.
    """
    check_backend(backend)
    if backend == "torch" or (backend == "auto" and _capability(device) not in _MEASURED):
        return None
    reason = _refusal(device, dtype, filters, taps)
    if reason is not None:
        if backend == "triton":
            say_once(reason)
        return None
    from hyena_dist.ops.triton import operator  # Triton is optional, and imported only where it is used
    return operator


@lru_cache
def say_once(reason: str) -> None:
    """Log that torch does Triton's work, and why."""
    logger.warning("ops.backend=triton: torch computes the operator here: %s", reason)


def _refusal(device: torch.device, dtype: torch.dtype, filters: Tensor, taps: int) -> str | None:
    if len(filters) != 1:
        return f"the kernels are of order 2, the model is of order {len(filters) + 1}"
    if taps > MOST_TAPS:
        return f"the kernels take short convolutions of at most {MOST_TAPS} taps, got {taps}"
    if torch.float64 in (dtype, filters.dtype):
        return "the kernels have no float64"
    if device.type != "meta" and not _interpreted():  # on meta tensors a GPU's step is counted
        capability = _capability(device)
        if capability is None:
            return f"the kernels run on CUDA, not on {device.type}"
        if capability < LEAST_CAPABILITY:
            return f"the kernels need a GPU of capability 8.0, this one has {'.'.join(map(str, capability))}"
    return None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on a CPU: for tests."""
    import triton
    return triton.knobs.runtime.interpret
