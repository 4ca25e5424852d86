"""The state of the Adams that engines drive: torch's, NVIDIA Apex's FusedAdam and DeepSpeed's for the CPU.

All keep the moments by torch's names. The step count is a tensor of each weight (torch), a number of each weight
(DeepSpeed) or a number of each parameter group (Apex).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyena_dist.engine.protocol import MOMENTS

_APEX = ("apex", "FusedAdam")
_DEEPSPEED = ("deepspeed", "DeepSpeedCPUAdam")
_KNOWN = (("torch", "Adam"), ("torch", "AdamW"), _APEX, _DEEPSPEED)


def require_adam(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state could not be saved and set.

    Raises:
        ValueError: it is none of those above.
    """
    if _kind(optimizer) not in _KNOWN:
        raise ValueError(f"the optimizer must be torch's Adam or AdamW, Apex's FusedAdam or DeepSpeed's "
                         f"DeepSpeedCPUAdam, got {type(optimizer).__name__}; in a DeepSpeed configuration that is "
                         "optimizer.params.torch_adam: true")


def create_state(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Create the state that Adam would create at its first step, so that it can be read and set before."""
    kind = _kind(optimizer)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for weight in weights:
        state = optimizer.state[weight]
        state.clear()
        if kind == _DEEPSPEED:
            state["step"] = 0
        elif kind != _APEX:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if on_device else "cpu")
        state.update({key: torch.zeros_like(weight, requires_grad=False) for key in MOMENTS})
    if kind == _APEX:
        for group in optimizer.param_groups:
            group["step"] = 0


def guard(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Let the next step change nothing, state and step count included, unless `norm` is finite. The device decides:
    the host does not wait for the norm. Returns False, and does nothing, where the optimizer has no such switch."""
    fused = _kind(optimizer)[0] == "torch" and all(group.get("fused") for group in optimizer.param_groups)
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    if not fused or any(weight.device != norm.device for weight in weights):  # offloaded ones would be read too early
        return False
    # As torch's GradScaler does. Of what is not finite the difference is NaN: half the launches of torch.isfinite.
    optimizer.found_inf = (norm - norm != 0).float()  # type: ignore[attr-defined]
    return True


def step_count(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> int:
    """Steps taken so far."""
    owner = optimizer.param_groups[0] if _kind(optimizer) == _APEX else optimizer.state[weights[0]]
    return int(owner["step"])


def set_step_count(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], steps: int) -> None:
    """Let the next step be number `steps` + 1."""
    owners = optimizer.param_groups if _kind(optimizer) == _APEX else [optimizer.state[weight] for weight in weights]
    for owner in owners:
        if isinstance(owner["step"], Tensor):
            owner["step"].fill_(steps)
        else:
            owner["step"] = steps


def _kind(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    return type(optimizer).__module__.partition(".")[0], type(optimizer).__name__
