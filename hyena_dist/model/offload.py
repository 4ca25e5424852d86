"""Keeps what the backward pass needs in the host's memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def on_host() -> saved_tensors_hooks:
    """A context in which tensors that are saved for the backward pass go to the host, and come back when it needs them.
    Weights stay where they are. On a CPU it costs a copy and gives nothing."""
    return saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
    if tensor.is_leaf and tensor.requires_grad:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor)


def _to_device(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    device, copy = saved
    return copy.to(device, non_blocking=True)
