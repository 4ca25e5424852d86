"""megatron-core's parallel linears and embedding in thin subclasses: its shapes and attributes, our arithmetic.

Megatron's own forward fails under autocast on a CPU (its backward mixes dtypes) and allocates on CUDA under sequence
parallelism. These subclasses keep the constructors (the local shard of each weight) and replace the forward by plain
torch operators, which autocast handles on every device, and our own collectives.

Legend: l tokens of a context slice, T tensor ranks, B batch. Where sequence parallelism is on, the residual stream and
the norms see l / T tokens of the slice, and products see all l.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.parallel.collectives import copy_to, gather_from, reduce_from, reduce_scatter_to
from hyena_dist.parallel.groups import Axis


def tensor_axis(pg_collection: ProcessGroupCollection | None) -> Axis:
    """The tensor axis of Megatron's collection of groups; without one, one rank."""
    return Axis.of(getattr(pg_collection, "tp", None))


def context_axis(pg_collection: ProcessGroupCollection | None) -> Axis:
    """The context axis of Megatron's collection of groups; without one, one rank."""
    return Axis.of(getattr(pg_collection, "cp", None))


def refuse_arguments(who: str, **arguments: Any) -> None:
    """Refuse what Megatron may pass to a `self_attention` and this one would ignore.

    Raises:
        ValueError: an argument is not None.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{who} takes no {', '.join(given)}")


def _no_initial_values(_: Tensor) -> None:
    raise AssertionError("megatron-core must not initialise weights: perform_initialization is off")


class _PlainState:
    """Weights only in the state dict: Megatron's linears add an empty `_extra_state` for Transformer Engine."""

    get_extra_state = nn.Module.get_extra_state


def enter_tensor_region(x: Tensor, config: HyenaConfig, axis: Axis) -> Tensor:
    """Before a product whose weight is split by output: [l or l / T, B, D] -> [l, B, D]."""
    return gather_from(x, axis, 0) if config.sequence_parallel else copy_to(x, axis)


def leave_tensor_region(x: Tensor, config: HyenaConfig, axis: Axis) -> Tensor:
    """After a product whose weight is split by input: partial sums [l, B, D] -> sums [l or l / T, B, D]."""
    return reduce_scatter_to(x, axis, 0) if config.sequence_parallel else reduce_from(x, axis)


def whole(weight: Tensor, config: HyenaConfig, axis: Axis) -> Tensor:
    """A weight that every tensor rank holds whole and uses on the tokens that it has: under sequence parallelism these
    are a part of them, and the gradient is summed here, at the weight's use."""
    return copy_to(weight, axis) if config.sequence_parallel else weight


class ColumnLinear(_PlainState, ColumnParallelLinear):
    """x [l or l / T, B, I] -> [l, B, O / T], with bias; the weight's rows are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        axis = tensor_axis(pg_collection)
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values, tp_group=axis.group)
        self.axis = axis
        if self.weight.shape[0] * axis.size != output_size:
            # Megatron falls back on its global groups where none is given.
            raise ValueError("Megatron's global tensor group is in the way of a module that was given another: pass a "
                             "pg_collection with the `tp` group that this model is split over")

    def forward(self, input_: Tensor) -> Tensor:
        return F.linear(enter_tensor_region(input_, self.config, self.axis), self.weight, self.bias)


class RowLinear(_PlainState, RowParallelLinear):
    """x [l, B, I / T] -> [l or l / T, B, O], with bias; the weight's columns are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        axis = tensor_axis(pg_collection)
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values, bias=True,
                         input_is_parallel=True, skip_bias_add=False, tp_group=axis.group)
        self.axis = axis

    def forward(self, input_: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(input_, self.weight, self.bias)
        return self._sum(F.linear(input_, self.weight))

    def _sum(self, partial: Tensor) -> Tensor:
        return leave_tensor_region(partial, self.config, self.axis) + whole(self.bias, self.config, self.axis)


class ToChannels(ColumnLinear):
    """x [l or l / T, B, I] -> [B, O / T, l]: the product is written channels first, so that nothing is transposed."""

    def forward(self, input_: Tensor) -> Tensor:
        x = enter_tensor_region(input_, self.config, self.axis).permute(1, 2, 0)
        return torch.baddbmm(self.bias[:, None], self.weight.expand(x.shape[0], -1, -1), x)


class FromChannels(RowLinear):
    """x [B, I / T, l] -> [l or l / T, B, O]: the product reads channels first, so that nothing is transposed."""

    def forward(self, input_: Tensor) -> Tensor:
        x, weight = input_.transpose(1, 2), self.weight.t().expand(input_.shape[0], -1, -1)
        if self.axis.size == 1:
            return torch.baddbmm(self.bias, x, weight).transpose(0, 1)
        return self._sum(torch.bmm(x, weight).transpose(0, 1))


class Embedding(nn.Module):
    """Token embedding [B, l] -> [l or l / T, B, D]; rows of its weight are split over the tensor ranks. The head's
    weight is the same."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        self.config = config
        self.axis = tensor_axis(pg_collection)
        self.word_embeddings = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size,
                                                      init_method=_no_initial_values, config=config,
                                                      tp_group=self.axis.group)

    def forward(self, input_ids: Tensor) -> Tensor:
        weight, ids = self.word_embeddings.weight, input_ids.t()
        if self.axis.size == 1:
            return F.embedding(ids, weight)
        local = ids - self.axis.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0)
        return leave_tensor_region(rows, self.config, self.axis)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of [..., D]."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.config = config
        self.axis = tensor_axis(pg_collection)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (whole(w, self.config, self.axis) for w in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class MLP(nn.Module):
    """[l or l / T, B, D] -> the same: fc1, GELU by tanh as published, fc2."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        assert config.ffn_hidden_size is not None
        self.fc1 = ColumnLinear(config.hidden_size, config.ffn_hidden_size, config=config, pg_collection=pg_collection)
        self.fc2 = RowLinear(config.ffn_hidden_size, config.hidden_size, config=config, pg_collection=pg_collection)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
