"""Every address of the kernels at sizes that no test can compute: on meta (`tests.triton_bounds`), where tensors have
more than 2^31 elements, offsets of 32 bits overflow and grids reach their limits. Of the groups of channels the first
and the last run."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from hyena_dist.ops.triton import filter, gelu, groups, norm
from hyena_dist.ops.triton.groups import Operator, Plan, channel_groups
from hyena_dist.ops.triton.plans import plan_for

BF16, FP32 = torch.bfloat16, torch.float32


def new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def first_and_last(*given: object) -> list[slice]:
    """Of `channel_groups`."""
    parts = channel_groups(*given)
    return parts if len(parts) < 3 else [parts[0], parts[-1]]


def operator(batch: int, channels: int, length: int, dtype: torch.dtype = BF16, order: int = 2,
             plan: Callable[[int, bool, bool], Plan] = plan_for) -> None:
    p, dy = new(batch, order + 1, channels, length, dtype=dtype), new(batch, channels, length, dtype=dtype)
    rows = (order + 1) * channels
    run = Operator.whole(p, new(rows, 3), new(rows), plan(length, dtype == FP32, True))
    h, direct = new(order - 1, channels, length), new(order - 1, channels)
    with patch.object(groups, "channel_groups", first_and_last):
        run.mix(h, direct)
        run.mix_backward(dy, h, direct)


def around(tokens: int, width: int) -> None:
    """Norm, GELU of 4 width, and filters of `tokens` lags."""
    x, h, weight = new(tokens, width), new(tokens, 4 * width, dtype=BF16), new(width)
    norm.forward._init_fn(x, weight, weight, 1e-5, BF16)
    gelu.forward._init_fn(h, torch.empty_like(h))
    with patch.object(norm, "PROGRAMS", 2**16), patch.object(gelu, "PROGRAMS", 2**18):  # of short loops
        norm.backward._init_fn(x, x.to(BF16), weight, 1e-5, torch.empty_like(x), torch.empty_like(x))
        gelu.backward._init_fn(h, torch.empty_like(h), torch.empty_like(h))
    trunk = [new(64, 5), new(64), new(64, 64), new(64)]
    filter.forward._init_fn(new(tokens, 5), trunk, new(64), new(width, 64), new(width), 0.05)


def checked(work: Callable[[], None]) -> Callable[[], dict[str, float]]:
    """A case of `tests.triton_cases`: what is outside is refused."""
    def case() -> dict[str, float]:
        work()
        return {"outside": 0.0}
    return case


CASES = {name: checked(work) for name, work in {
    "sizes, three kernels": lambda: operator(4, 1024, 2**20),
    "sizes, one kernel": lambda: operator(24, 2**15, 1024),
    "sizes, columns of 64": lambda: operator(16, 1024, 2**18, FP32),
    "sizes, cufft": lambda: operator(2, 512, 2**22 + 16, plan=lambda *_: None),
    "sizes, order 3": lambda: operator(9, 256, 2**18, order=3),
    "sizes, around": lambda: around(2**22, 1024),
}.items()}
