"""HyenaMixer: the order-N Hyena operator as a module where Megatron expects `self_attention`.

Legend: l tokens of a context slice (all of them on one rank), T tensor ranks, B batch, D channels, C = D / T of them on
this tensor rank, N order. Megatron's layout [l, B, D] outside, [B, C, l] inside.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.context import all_to_all_convs, choose_method, distributed_fft_convs, local_convs
from hyena_dist.model.layers import FromChannels, ToChannels, context_axis, refuse_arguments, tensor_axis
from hyena_dist.ops.implicit_filter import decay_rates, implicit_filter
from hyena_dist.ops.precision import without_autocast
from hyena_dist.ops.short_conv import short_conv
from hyena_dist.parallel.collectives import copy_to, halo_from_left


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

    def forward(self, lags: list[slice], channels: Tensor | None = None) -> Tensor:
        """[N - 1, C, n]: some channels (int64; None: all) at ranges of lags, one after the other. Lags past the
        model's longest input, which only padding reaches, are 0."""
        config, filters = self.config, self.config.num_filters
        freq, trunk = copy_to(self.freq, self.axis), self._trunk()
        decay = decay_rates(filters * config.hidden_size, freq.dtype, freq.device)
        decay = decay.view(filters, self.axis.size, self.channels)[:, self.axis.rank]
        last = self.last_weight.view(filters, self.channels, -1)
        if channels is not None:
            decay, last = decay[:, channels], last[:, channels]
        with without_autocast(freq):
            pieces = []
            for part in lags:
                defined = slice(min(part.start, config.max_seq_len), min(part.stop, config.max_seq_len))
                rows = implicit_filter(trunk, freq, last.flatten(0, 1), decay.flatten(), config.filter_shape, defined)
                pieces.append(F.pad(rows, (0, part.stop - part.start - rows.shape[1])))
        return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).unflatten(0, (filters, -1))

    def _trunk(self) -> list[tuple[Tensor, Tensor]]:
        return [(copy_to(getattr(self, f"trunk_weight_{i}"), self.axis),
                 copy_to(getattr(self, f"trunk_bias_{i}"), self.axis))
                for i in range(self.config.filter_num_inner_mlps + 1)]


class ShortConv(nn.Module):
    """Depthwise causal convolution of this tensor rank's (N + 1) C channels: [B, (N + 1) C, l] -> the same shape. The
    first tokens of a slice take their left neighbours from the context rank before."""

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        self.axis = context_axis(pg_collection)
        channels = (config.hyena_order + 1) * config.hidden_size // tensor_axis(pg_collection).size
        self.weight = nn.Parameter(torch.empty(channels, config.short_conv_kernel, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=config.params_dtype))

    def forward(self, p: Tensor) -> Tensor:
        reach = self.weight.shape[1] - 1
        if self.axis.size == 1 or reach == 0:
            return short_conv(p, self.weight, self.bias)
        halo = halo_from_left(p[..., -reach:], self.axis)
        y = short_conv(p, self.weight, self.bias)
        # What the halo adds to the first tokens: the convolution is linear, so the slice itself is not copied.
        y[..., :reach] += short_conv(F.pad(halo, (0, reach)), self.weight, torch.zeros_like(self.bias))[..., reach:]
        return y


class HyenaMixer(nn.Module):
    """The Hyena operator of order N on [L, B, D] (Poli et al. 2023, definition 3.1, as published in HyenaDNA):

        x0 | x1 | ... | v = short_conv(in_proj(x))
        u = x_{N-1} * v;   for o in 0 .. N-2:  u = x_{N-2-o} * (h_o (*) u + bias_o * u)
        out = out_proj(u)

    Built by Megatron's `build_module` from a ModuleSpec like any `self_attention`; attention's own arguments
    (masks, rotary positions, inference state) must be None, because a convolution would ignore them.
    """

    def __init__(self, config: HyenaConfig, layer_number: int, *,
                 pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        width = config.hidden_size
        self.axis = context_axis(pg_collection)
        self.channels = width // tensor_axis(pg_collection).size
        self.in_proj = ToChannels(width, (config.hyena_order + 1) * width, config=config, pg_collection=pg_collection)
        self.short_conv = ShortConv(config, pg_collection)
        self.filter = ImplicitFilter(config, pg_collection)
        self.conv_bias = nn.Parameter(torch.empty(config.num_filters * self.channels, dtype=config.params_dtype))
        self.out_proj = FromChannels(width, width, config=config, pg_collection=pg_collection)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                **attention_arguments: Any) -> tuple[Tensor, None]:
        """[l or l / T, B, D] -> (the same shape, no bias left to add).

        Raises:
            ValueError: an argument of attention that is not None.
        """
        refuse_arguments("HyenaMixer is a causal convolution and", attention_mask=attention_mask, **attention_arguments)
        p = self.short_conv(self.in_proj(hidden_states))
        *gates, v = p.split(self.channels, dim=1)
        u = gates.pop() * v
        return self.out_proj(self._convs(u, gates[::-1])), None

    def _convs(self, u: Tensor, gates: list[Tensor]) -> Tensor:
        """u [B, C, l] through every filter, each followed by a gate."""
        config, bias = self.config, self.conv_bias.view(self.config.num_filters, self.channels)
        if self.axis.size == 1:
            return local_convs(u, gates, self.filter, bias)
        method = choose_method(config.context_method, rows=u.shape[0] * u.shape[1] // config.overlap_groups,
                               context=self.axis.size)
        if method == "all_to_all":
            return all_to_all_convs(u, gates, self.filter, bias, self.axis, config.overlap_groups)
        return distributed_fft_convs(u, gates, self.filter, bias, self.axis)
