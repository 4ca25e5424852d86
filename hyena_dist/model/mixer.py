"""HyenaMixer: the order-N Hyena operator as a module where Megatron expects `self_attention`.

Legend: L tokens, B batch, D channels, N order. Megatron's layout [L, B, D] outside, [B, D, L] inside.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.layers import FromChannels, ToChannels
from hyena_dist.ops.implicit_filter import decay_rates, implicit_filter
from hyena_dist.ops.long_conv import causal_conv
from hyena_dist.ops.precision import without_autocast
from hyena_dist.ops.short_conv import short_conv


class ImplicitFilter(nn.Module):
    """The mixer's N - 1 long filters: rows `o * D + c` are channel c of filter o. Always in its weights' own dtype.

    Positions and decay rates are recomputed, not stored: they are functions of the configuration.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        width, dtype = config.filter_order, config.params_dtype
        self.freq = nn.Parameter(torch.empty(width, dtype=dtype))
        for i in range(config.filter_num_inner_mlps + 1):
            inputs = config.filter_emb_dim if i == 0 else width
            self.register_parameter(f"trunk_weight_{i}", nn.Parameter(torch.empty(width, inputs, dtype=dtype)))
            self.register_parameter(f"trunk_bias_{i}", nn.Parameter(torch.empty(width, dtype=dtype)))
        self.last_weight = nn.Parameter(torch.empty(config.num_filters * config.hidden_size, width, dtype=dtype))

    def forward(self, length: int) -> Tensor:
        """The first `length` lags: [N - 1, D, length]."""
        config, dtype, device = self.config, self.freq.dtype, self.freq.device
        trunk = [(getattr(self, f"trunk_weight_{i}"), getattr(self, f"trunk_bias_{i}"))
                 for i in range(config.filter_num_inner_mlps + 1)]
        decay = decay_rates(config.num_filters * config.hidden_size, dtype, device)
        with without_autocast(self.freq):
            rows = implicit_filter(trunk, self.freq, self.last_weight, decay, config.filter_shape, slice(0, length))
        return rows.view(config.num_filters, config.hidden_size, length)


class ShortConv(nn.Module):
    """Depthwise causal convolution of the projection's channels: [B, (N + 1) D, L] -> the same shape."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        channels, dtype = (config.hyena_order + 1) * config.hidden_size, config.params_dtype
        self.weight = nn.Parameter(torch.empty(channels, config.short_conv_kernel, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype))

    def forward(self, p: Tensor) -> Tensor:
        return short_conv(p, self.weight, self.bias)


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
        self.in_proj = ToChannels(width, (config.hyena_order + 1) * width, config=config, pg_collection=pg_collection)
        self.short_conv = ShortConv(config)
        self.filter = ImplicitFilter(config)
        self.conv_bias = nn.Parameter(torch.empty(config.num_filters * width, dtype=config.params_dtype))
        self.out_proj = FromChannels(width, width, config=config, pg_collection=pg_collection)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                **attention_arguments: Any) -> tuple[Tensor, None]:
        """[L, B, D] -> ([L, B, D], no bias left to add).

        Raises:
            ValueError: an argument of attention that is not None.
        """
        given = [name for name, value in {"attention_mask": attention_mask, **attention_arguments}.items()
                 if value is not None]
        if given:
            raise ValueError(f"HyenaMixer is a causal convolution and takes no {', '.join(given)}")
        order, width = self.config.hyena_order, self.config.hidden_size
        p = self.short_conv(self.in_proj(hidden_states))
        *gates, v = p.split(width, dim=1)
        filters = self.filter(hidden_states.shape[0])
        u = gates[-1] * v
        for o, (h, bias) in enumerate(zip(filters, self.conv_bias.view(-1, width), strict=True)):
            u = causal_conv(u, h, bias, gates[order - 2 - o])
        return self.out_proj(u), None
