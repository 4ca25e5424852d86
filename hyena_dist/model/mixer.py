"""HyenaMixer: the order-N Hyena operator as a module where Megatron expects `self_attention`.

Legend: l tokens of a context slice (all of them on one rank), T tensor ranks, B batch, D channels, C = D / T of them on
this tensor rank, N order. Megatron's layout [l, B, D] outside, [B, C, l] inside.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.config.context import choose_method, exchanged_rows
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.context import AllToAll, DistributedFft
from hyena_dist.model.initial import initialize_part, layer_name
from hyena_dist.model.layers import (
    ColumnLinear,
    Norm,
    RowLinear,
    enter_tensor_region,
    in_tensor_region,
    refuse_arguments,
    refuse_shape,
)
from hyena_dist.ops.backends import check_backend, say_once
from hyena_dist.ops.hyena import HyenaWeights, hyena
from hyena_dist.ops.implicit_filter import decay_rates, implicit_filter, keeps_trunk
from hyena_dist.ops.libraries import PACKAGES
from hyena_dist.ops.precision import without_autocast
from hyena_dist.ops.segments import Offsets, Segments, segments_of
from hyena_dist.parallel.collectives import copy_to
from hyena_dist.parallel.groups import context_axis, tensor_axis


class ImplicitFilter(nn.Module):
    """The mixer's N - 1 long filters: rows `o * C + c` are channel c of filter o, of this tensor rank's C channels.
    Always in its weights' own dtype.

    Positions and decay rates are recomputed, not stored: they are functions of the configuration. The trunk is whole on
    every tensor rank, and each rank's channels give a part of its gradient.
    """

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        self.config = config
        self.axis = tensor_axis(pg_collection)
        self.channels = config.hidden_size // self.axis.size
        width, dtype = config.filter_order, config.params_dtype
        self.freq = nn.Parameter(torch.empty(width, dtype=dtype))
        for i in range(config.filter_num_inner_mlps + 1):
            inputs = config.filter_emb_dim if i == 0 else width
            self.register_parameter(f"trunk_weight_{i}", nn.Parameter(torch.empty(width, inputs, dtype=dtype)))
            self.register_parameter(f"trunk_bias_{i}", nn.Parameter(torch.empty(width, dtype=dtype)))
        self.last_weight = nn.Parameter(torch.empty(config.num_filters * self.channels, width, dtype=dtype))

    def forward(self, lags: list[slice], channels: Sequence[slice] | None = None, *,
                recompute: bool = True) -> Tensor:
        """[N - 1, C, n]: ranges of channels (None: all) at ranges of lags, one after the other. Lags past the model's
        longest input, which only padding reaches, are 0. With `recompute`, the backward pass recomputes the trunk, of
        which only the weights are kept."""
        config, filters = self.config, self.config.num_filters
        freq, trunk = copy_to(self.freq, self.axis), self._trunk()
        decay = decay_rates(filters * config.hidden_size, freq.dtype, freq.device)
        decay = decay.view(filters, self.axis.size, self.channels)[:, self.axis.rank]
        last = self.last_weight.view(filters, self.channels, -1)
        if channels is not None:
            decay, last = _side_by_side(decay, channels), _side_by_side(last, channels)
        with without_autocast(freq):
            pieces = []
            for part in lags:
                defined = slice(min(part.start, config.max_seq_len), min(part.stop, config.max_seq_len))
                rows = implicit_filter(trunk, freq, last.flatten(0, 1), decay.flatten(), config.filter_shape, defined,
                                       recompute=recompute, backend=config.ops_backend)
                padding = part.stop - part.start - rows.shape[1]
                pieces.append(F.pad(rows, (0, padding)) if padding else rows)
        return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).unflatten(0, (filters, -1))

    def _trunk(self) -> list[tuple[Tensor, Tensor]]:
        return [(copy_to(getattr(self, f"trunk_weight_{i}"), self.axis),
                 copy_to(getattr(self, f"trunk_bias_{i}"), self.axis))
                for i in range(self.config.filter_num_inner_mlps + 1)]


def _side_by_side(x: Tensor, channels: Sequence[slice]) -> Tensor:
    """Ranges of channels of [N - 1, C, ...]; one range is a view."""
    pieces = [x[:, part] for part in channels]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


class ShortConv(nn.Module):
    """Weights of the depthwise causal convolution of this tensor rank's (N + 1) C channels."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        channels = (config.hyena_order + 1) * config.hidden_size // tensor_axis(pg_collection).size
        self.weight = nn.Parameter(torch.empty(channels, config.short_conv_kernel, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=config.params_dtype))


class HyenaMixer(nn.Module):
    """The Hyena operator of order N on [L, B, D] (Poli et al. 2023, definition 3.1, as published in HyenaDNA):

        x0 | x1 | ... | v = short_conv(in_proj(x))
        u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)
        out = out_proj(u)

    Built by Megatron's `build_module` from a ModuleSpec like any `self_attention`; attention's own arguments
    (masks, rotary positions, inference state) must be None, because a convolution would ignore them.

    Args:
        layer_number: of the layer, from 1.
        seed: of the initial values, those of a HyenaModel's mixer in this layer; None leaves them to a model around it.
    """

    def __init__(self, config: HyenaConfig, layer_number: int, *,
                 pg_collection: ProcessGroupCollection | None = None, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        width = config.hidden_size
        self.axis = context_axis(pg_collection)
        self.channels = width // tensor_axis(pg_collection).size
        self.in_proj = ColumnLinear(width, (config.hyena_order + 1) * width, config=config, pg_collection=pg_collection)
        self.short_conv = ShortConv(config, pg_collection)
        self.filter = ImplicitFilter(config, pg_collection)
        self.conv_bias = nn.Parameter(torch.empty(config.num_filters * self.channels, dtype=config.params_dtype))
        self.out_proj = RowLinear(width, width, config=config, pg_collection=pg_collection)
        initialize_part(self, f"{layer_name(layer_number)}.mixer", config, self.in_proj.axis, seed)
        check_backend(config.ops_backend)
        if config.ops_backend in PACKAGES and self.axis.size > 1:
            say_once("its convolution is of one context rank", config.ops_backend)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, norm: Norm | None = None,
                residual: bool = False, segments: Offsets | Segments | None = None,
                **attention_arguments: Any) -> tuple[Tensor, None]:
        """[l or l / T, B, D] -> (the same shape, no bias left to add).

        Args:
            norm: the norm before the mixer, where it is not applied yet.
            residual: add hidden_states, not normalised.
            segments: sequences that stand one after the other in the tokens of all context ranks (`ops.segments`), and
                are convolved apart.

        Raises:
            ValueError: an argument of attention that is not None, another width, more tokens than max_seq_len, segments
                that do not fit, or that the context ranks cannot convolve apart.
        """
        refuse_arguments("HyenaMixer is a causal convolution and", attention_mask=attention_mask, **attention_arguments)
        refuse_shape("HyenaMixer", hidden_states, self.config, self.axis, self.in_proj.axis)
        x = enter_tensor_region(hidden_states, self.config, self.in_proj.axis)
        inside = residual and self.in_proj.axis.size == 1
        segments = segments_of(segments, x.shape[1], len(x) * self.axis.size)
        exchange, recompute = self._exchange(batch=x.shape[1]), self.config.recompute_inner
        if exchange is None:
            lags = segments.longest if segments else len(x)
            filters = self.filter([slice(0, lags)], recompute=recompute or not keeps_trunk(lags))
        else:
            filters = exchange.filters(self.filter, len(x), segments)
        in_proj, short, out_proj = self.in_proj, self.short_conv, self.out_proj
        weights = HyenaWeights(in_proj.used_weight, in_proj.bias, short.weight, short.bias, filters,
                               self.conv_bias.view(self.config.num_filters, self.channels), out_proj.used_weight,
                               out_proj.local_bias)
        out = hyena(x, weights, in_tensor_region(norm), residual=inside, recompute=recompute,
                    backend=self.config.ops_backend, segments=segments, exchange=exchange)
        out = out_proj.finish(out)
        return hidden_states + out if residual and not inside else out, None

    def _exchange(self, batch: int) -> AllToAll | DistributedFft | None:
        """How the convolutions cross the context ranks; None where there is one."""
        config, channels, ranks = self.config, self.channels, self.axis.size
        if ranks == 1:
            return None
        rows = exchanged_rows(channels=channels, batch=batch, groups=config.overlap_groups)
        if choose_method(config.context_method, rows=rows, ranks=ranks) == "all_to_all":
            return AllToAll(self.axis, batch=batch, channels=channels, groups=config.overlap_groups,
                            backend=config.ops_backend)
        if config.ops_backend == "triton":
            say_once("the transform that is spread over context ranks is torch's")
        return DistributedFft(self.axis)
