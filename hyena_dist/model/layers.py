"""megatron-core's parallel linears and embedding in thin subclasses: its shapes and attributes, our arithmetic.

Megatron's own forward fails under autocast on a CPU (its backward mixes dtypes) and allocates on CUDA under sequence
parallelism. These subclasses keep the constructors (the local shard of each weight) and replace the forward by plain
torch operators, which autocast handles on every device, and our own collectives.

Legend: l tokens of a context slice, T tensor ranks, B batch. Where sequence parallelism is on, the residual stream and
the norms see l / T tokens of the slice, and products see all l.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.initial import initialize_part, layer_name
from hyena_dist.model.vocabulary import outside_vocabulary, refuse_outside
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.ops.embedding import embedding
from hyena_dist.ops.linear import linear
from hyena_dist.ops.mlp import MLPWeights, mlp
from hyena_dist.ops.norm import NormWeights, layer_norm
from hyena_dist.parallel.collectives import copy_to, gather_from, reduce_from, reduce_scatter_to
from hyena_dist.parallel.groups import Axis, tensor_axis
from hyena_dist.parallel.tokens import padded_length, token_multiple


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


def refuse_shape(who: str, x: Tensor, config: HyenaConfig, context: Axis, tensor: Axis) -> None:
    """Refuse an input of another width or type, with no token, or with more than the model takes.

    Raises:
        ValueError: naming the shape that is wanted.
    """
    wanted = f"{who} takes [L, B, D] = [tokens, batch, {config.hidden_size}], got {list(x.shape)}"
    if x.dim() != 3 or x.shape[2] != config.hidden_size:
        raise ValueError(f"{wanted}: transpose it, or build the module with its hidden_size")
    if not x.is_floating_point():
        raise ValueError(f"{wanted} of {str(x.dtype).removeprefix('torch.')}: convert it to a floating-point type")
    if x.numel() == 0:
        raise ValueError(f"{wanted}, which has no token: leave out what is empty")
    length = len(x) * context.size * (tensor.size if config.sequence_parallel else 1)
    multiple = token_multiple(context=context.size, tensor=tensor.size, sequence=config.sequence_parallel)
    if length > padded_length(config.max_seq_len, multiple):
        raise ValueError(f"{wanted}, which is {length} tokens: max_seq_len is {config.max_seq_len}; transpose an input "
                         "of [B, L, D], shorten it, or use a longer max_seq_len")


def active_key(key: DropoutKey | None, rows: int, tokens: int, config: HyenaConfig, tensor: Axis, context: Axis,
               device: torch.device) -> DropoutKey:
    """The key of a forward pass at this rank's place in the sequence.

    Args:
        key: None: one is drawn from torch's generator of this device, as torch's own dropout draws, once for the pass;
            the first tensor and context rank's is taken by the others, who hold other parts of the same rows.
        rows, tokens: how many sequences, and tokens of each, this rank holds.
    """
    if key is None:
        windows = torch.randint(2**63 - 1, (rows,), device=device)
        for axis in (tensor, context):
            if axis.size > 1:
                dist.broadcast(windows, group=axis.group, group_src=0)
        key = DropoutKey(seed=0, step=0, windows=windows)
    place = context.rank * tensor.size + tensor.rank if config.sequence_parallel else context.rank
    return replace(key, first_token=place * tokens)


class _Product:
    """What the products over the channels have in common: weights only in the state dict (Megatron's linears add an
    empty `_extra_state` for Transformer Engine), and room for an adapter."""

    weight: nn.Parameter
    lora: nn.Module | None
    """An adapter (`model.lora`), which makes the weight that is used from the one that is held."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def used_weight(self) -> Tensor:
        """The weight of the product."""
        return self.weight if self.lora is None else self.lora(self.weight)


def _forget_megatron(module: Any) -> None:
    """Drop from a module of Megatron what only its own forward and state dict use, and what stands in the way of copies
    and pickles: the group, and a hook without a name."""
    module.tp_group = None
    module._load_state_dict_pre_hooks.clear()


def enter_tensor_region(x: Tensor, config: HyenaConfig, axis: Axis) -> Tensor:
    """Before a product whose weight is split by output: [l or l / T, B, D] -> [l, B, D]."""
    return gather_from(x, axis, 0) if config.sequence_parallel else copy_to(x, axis)


def leave_tensor_region(x: Tensor, config: HyenaConfig, axis: Axis) -> Tensor:
    """After a product whose weight is split by input: partial sums [l, B, D] -> sums [l or l / T, B, D]."""
    return reduce_scatter_to(x, axis, 0) if config.sequence_parallel else reduce_from(x, axis)


def whole(weight: Tensor, axis: Axis) -> Tensor:
    """A weight that every tensor rank holds whole and uses for a part of the channels or tokens: its gradient is summed
    over the ranks here, at the weight's use."""
    return copy_to(weight, axis)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of [..., D]."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.config = config
        self.axis = tensor_axis(pg_collection)

    def forward(self, input: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return layer_norm(input, self.in_tensor_region())
        return layer_norm(input, NormWeights(self.weight, self.bias, self.eps, self.config.ops_backend))

    def in_tensor_region(self) -> NormWeights:
        """The norm as a part of the product after it, which recomputes it: there it stands behind
        `enter_tensor_region`, with all tokens of the slice, and each rank's product gives a part of its gradients."""
        return NormWeights(whole(self.weight, self.axis), whole(self.bias, self.axis), self.eps,
                           self.config.ops_backend)


def in_tensor_region(norm: Norm | None) -> NormWeights | None:
    """A norm as a part of the product after it, if there is one."""
    return None if norm is None else norm.in_tensor_region()


class ColumnLinear(_Product, ColumnParallelLinear):
    """x [l or l / T, B, I] -> [l, B, O / T], with bias, of the normalised x where a norm is given; the weight's rows
    are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        axis = tensor_axis(pg_collection)
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values, tp_group=axis.group)
        self.axis = axis
        self.register_module("lora", None)
        _forget_megatron(self)
        if self.weight.shape[0] * axis.size != output_size:
            # Megatron falls back on its global groups where none is given.
            raise ValueError("Megatron's global tensor group is in the way of a module that was given another: pass a "
                             "pg_collection with the `tp` group that this model is split over")

    def forward(self, input_: Tensor, norm: Norm | None = None) -> Tensor:
        x = enter_tensor_region(input_, self.config, self.axis)
        return linear(x, self.used_weight, self.bias, in_tensor_region(norm))


class RowLinear(_Product, RowParallelLinear):
    """x [l, B, I / T] -> [l or l / T, B, O], with bias; the weight's columns are split over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, config: HyenaConfig,
                 pg_collection: ProcessGroupCollection | None) -> None:
        axis = tensor_axis(pg_collection)
        super().__init__(input_size, output_size, config=config, init_method=_no_initial_values, bias=True,
                         input_is_parallel=True, skip_bias_add=False, tp_group=axis.group)
        self.axis = axis
        self.register_module("lora", None)
        _forget_megatron(self)

    def forward(self, input_: Tensor) -> Tensor:
        return self.finish(linear(input_, self.used_weight, self.local_bias))

    @property
    def local_bias(self) -> Tensor | None:
        """What the product itself adds: over several ranks nothing, because their products are summed."""
        return self.bias if self.axis.size == 1 else None

    def finish(self, product: Tensor) -> Tensor:
        """What follows the product: [l, B, O] -> [l or l / T, B, O]."""
        if self.axis.size == 1:
            return product
        bias = whole(self.bias, self.axis) if self.config.sequence_parallel else self.bias
        return leave_tensor_region(product, self.config, self.axis) + bias


class Embedding(nn.Module):
    """Token embedding [B, l] -> [l or l / T, B, D]; rows of its weight are split over the tensor ranks. It is the
    head's weight too, unless they are untied. A soft prompt (`model.prompt`) may stand in place of the first tokens.

    Args:
        seed: as the mixers'.
    """

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None = None, *,
                 seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.axis = tensor_axis(pg_collection)
        self.word_embeddings = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size,
                                                      init_method=_no_initial_values, config=config,
                                                      tp_group=self.axis.group)
        self.prompt: nn.Module | None = None
        _forget_megatron(self.word_embeddings)
        initialize_part(self, "embedding", config, self.axis, seed)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Raises ValueError: on a CPU, an id outside the vocabulary. On CUDA its row is NaN over several tensor ranks,
        and torch's own assertion on one: to ask would be to wait for the device."""
        rows = self._rows(input_ids)
        return rows if self.prompt is None else self.prompt(rows)

    def _rows(self, input_ids: Tensor) -> Tensor:
        weight, ids = self.word_embeddings.weight, input_ids.t()
        size = weight.shape[0] * self.axis.size
        refuse_outside("input_ids", input_ids, size)
        if self.axis.size == 1:
            return embedding(ids, weight)
        local = ids - self.axis.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        rows = embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0)
        rows = rows.masked_fill(outside_vocabulary(ids, size)[..., None], math.nan)
        return leave_tensor_region(rows, self.config, self.axis)


class MLP(nn.Module):
    """[l or l / T, B, D] -> the same: the norm before it where one is given, fc1, GELU by tanh as published, fc2.

    Args:
        layer_number, seed: as the mixers'.
    """

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None = None, *,
                 layer_number: int = 1, seed: int | None = 0) -> None:
        super().__init__()
        assert config.ffn_hidden_size is not None
        self.config = config
        self.fc1 = ColumnLinear(config.hidden_size, config.ffn_hidden_size, config=config, pg_collection=pg_collection)
        self.fc2 = RowLinear(config.ffn_hidden_size, config.hidden_size, config=config, pg_collection=pg_collection)
        initialize_part(self, f"{layer_name(layer_number)}.mlp", config, self.fc1.axis, seed)

    def forward(self, x: Tensor, norm: Norm | None = None, *, residual: bool = False) -> Tensor:
        """With `residual`, x is added."""
        inside = residual and self.fc1.axis.size == 1
        weights = MLPWeights(self.fc1.used_weight, self.fc1.bias, self.fc2.used_weight, self.fc2.local_bias)
        y = self.fc2.finish(mlp(enter_tensor_region(x, self.config, self.fc1.axis), weights, in_tensor_region(norm),
                                residual=inside, recompute=self.config.recompute_inner,
                                backend=self.config.ops_backend))
        return x + y if residual and not inside else y
