"""Keeps an operator out of the surrounding autocast: the filter and the FFT never run in half precision."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's kind of device."""
    return torch.autocast(autocast_kind(tensor.device), enabled=False)


def autocast_kind(device: torch.device) -> str:
    """The kind of device whose autocast holds on a device. Torch has none for meta tensors, on which a GPU's step is
    counted: there it is that of a CPU, which every build of torch has."""
    return "cpu" if device.type == "meta" else device.type


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x where it is called: autocast's, else its own."""
    kind = autocast_kind(x.device)
    lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowered else x.dtype


def lowered(dtype: torch.dtype, *weights: Any) -> list[Any]:
    """Weights (tensors or None) in the dtype of a product, by one call for all of them where there are kernels for
    that."""
    if all(w is None or w.dtype == dtype for w in weights):
        return list(weights)
    made = [None if w is None else torch.empty_like(w, dtype=dtype) for w in weights]
    torch._foreach_copy_([m for m in made if m is not None], [w for w in weights if w is not None])
    return made


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which may be wider than the factors: on a GPU as the product accumulates it."""
    if dtype == torch.float32 and a.dtype.itemsize == 2 and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=dtype)
    return a.mm(b).to(dtype)


def accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, in the memory of total; None: nothing yet."""
    return part if total is None else total.add_(part)


def accumulate_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`, which may be wider than the factors, in the memory of total; None: nothing yet."""
    if total is not None and dtype == a.dtype:
        return torch.addmm(total, a, b, out=total)  # addmm_ is not counted by torch's FlopCounterMode
    return accumulate(total, product(a, b, dtype))
