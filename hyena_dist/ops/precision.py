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


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x where it is called: autocast's, else its own."""
    kind = x.device.type
    lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowered else x.dtype


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than the factors."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # addmm_ is not counted by torch's FlopCounterMode
    else:
        total.add_(a.mm(b))
