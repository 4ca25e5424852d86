"""megatron-core's parallel linears and embedding in thin subclasses: its shapes and attributes, our arithmetic.

Megatron's own forward fails under autocast on a CPU (its backward mixes dtypes) and allocates on CUDA under sequence
parallelism. These subclasses keep the constructors (the local shard of each weight) and replace the forward by plain
torch operators, which autocast handles on every device.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig


def tensor_group(pg_collection: ProcessGroupCollection | None):
    """The tensor-parallel group of Megatron's collection; None is one rank."""
    return getattr(pg_collection, "tp", None)


def _no_initial_values(_: Tensor) -> None:
    raise AssertionError("megatron-core must not initialise weights: perform_initialization is off")


class _PlainState:
    """Weights only in the state dict: Megatron's linears add an empty `_extra_state` for Transformer Engine."""

    get_extra_state = nn.Module.get_extra_state


class ColumnLinear(_PlainState, ColumnParallelLinear):
    """x [..., I] -> [..., O / tp], with bias; the weight's rows are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values,
                         tp_group=tensor_group(pg_collection))

    def forward(self, input_: Tensor) -> Tensor:
        return F.linear(input_, self.weight, self.bias)


class RowLinear(_PlainState, RowParallelLinear):
    """x [..., I / tp] -> [..., O], with bias; the weight's columns are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values, bias=True,
                         input_is_parallel=True, skip_bias_add=False, tp_group=tensor_group(pg_collection))

    def forward(self, input_: Tensor) -> Tensor:
        return F.linear(input_, self.weight, self.bias)


class ToChannels(ColumnLinear):
    """x [L, B, I] -> [B, O / tp, L]: the product is written channels first, so that nothing is transposed."""

    def forward(self, input_: Tensor) -> Tensor:
        batch = input_.shape[1]
        return torch.baddbmm(self.bias[:, None], self.weight.expand(batch, -1, -1), input_.permute(1, 2, 0))


class FromChannels(RowLinear):
    """x [B, I / tp, L] -> [L, B, O]: the product reads channels first, so that nothing is transposed."""

    def forward(self, input_: Tensor) -> Tensor:
        batch = input_.shape[0]
        return torch.baddbmm(self.bias, input_.transpose(1, 2), self.weight.t().expand(batch, -1, -1)).transpose(0, 1)


class Embedding(nn.Module):
    """Token embedding [B, L] -> [L, B, D]; its weight is the head's, too."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size,
                                                      init_method=_no_initial_values, config=config,
                                                      tp_group=tensor_group(pg_collection))

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids.t(), self.word_embeddings.weight)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of [..., D]."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)


class MLP(nn.Module):
    """[..., D] -> [..., D]: fc1, GELU by tanh as published, fc2."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        assert config.ffn_hidden_size is not None
        self.fc1 = ColumnLinear(config.hidden_size, config.ffn_hidden_size, config=config, pg_collection=pg_collection)
        self.fc2 = RowLinear(config.ffn_hidden_size, config.hidden_size, config=config, pg_collection=pg_collection)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
