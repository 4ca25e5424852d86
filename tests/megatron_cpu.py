"""Lets more of Megatron run where there is no CUDA: its random number states, recomputation and sequence parallelism.

For tests only. A stock GPTModel of Hyena layers runs on a CPU without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from megatron.core.models import backends
from megatron.core.tensor_parallel import random
from megatron.core.transformer import transformer_block
from torch import nn


class MarkedNorm(nn.LayerNorm):
    """As Apex's: its weights are marked, so that Megatron sums their gradients over the tensor ranks. Megatron's own
    wrapper of torch's norm refuses sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    patches = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", torch.get_rng_state),
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (backends, "LNImpl", MarkedNorm),
        (transformer_block, "LayerNormImpl", MarkedNorm),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
