"""Keeps an operator out of the surrounding autocast: the filter and the FFT never run in half precision."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's kind of device."""
    return torch.autocast(tensor.device.type, enabled=False)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
