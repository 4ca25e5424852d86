"""The global gradient norm and clipping, from the placement table: the one way of every engine that keeps torch's
gradients. FSDP2's own knows the data ranks only, and is wrong where weights are split over tensor ranks."""

import math
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from hyena_dist.engine.protocol import Table
from hyena_dist.parallel.groups import Axis

ONE_RANK = Axis()


def global_grad_norm(gradients: Mapping[str, Tensor], table: Table | None, tensor: Axis, shards: Axis = ONE_RANK, *,
                     device: torch.device) -> Tensor:
    """The 2-norm over all ranks, 0-dim float32 on `device`, the same on each; inf or nan if a gradient is.

    Args:
        gradients: what this rank holds, by name: of weights split over `tensor` its part, of the others the whole.
        table: which weights are split; needed only where there are several tensor ranks.
        shards: the ranks over which each gradient is cut up; one rank: every data rank has it all.
        device: the one on which the groups communicate.
    """
    if tensor.size == shards.size == 1:
        return get_total_norm(list(gradients.values())).to(device, torch.float32)
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for name, gradient in gradients.items():
        (split if table is not None and table[name].tp_dim is not None else whole).append(gradient)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    # A replicated gradient is on every tensor rank; of each an equal share makes one. The norm of nothing would be made
    # on the host, and the device be waited for.
    for held, copies in ((split, 1), (whole, tensor.size)):
        if held:
            squares += get_total_norm(held).to(device, torch.float64).square() / copies
    for axis in (shards, tensor):
        if axis.size > 1:
            dist.all_reduce(squares, group=axis.group)
    return squares.sqrt().float()


def clip_gradients(gradients: Collection[Tensor], norm: Tensor, max_norm: float, *, loss_scale: float = 1.0) -> None:
    """Divide by the loss scale and clip, in place. `norm` is that of the gradients without the scale; they are on one
    device, which may be another."""
    if not gradients or (max_norm == math.inf and loss_scale == 1.0):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own rule, the small number included
    if loss_scale != 1.0:
        factor = factor / loss_scale
    torch._foreach_mul_(list(gradients), factor.to(next(iter(gradients)).device))
