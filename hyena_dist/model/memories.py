"""What each kind of mixer keeps of a sequence that is read a token at a time (`model.kinds.MixerMemory`).

Legend: B sequences, P tokens of a prompt, n tokens that may follow, D channels of the residual stream, C of the mixer,
N order, K taps of the short convolution, H heads of Dh channels.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.model.attention import AttentionMixer, rotary
from hyena_dist.model.layers import ColumnLinear, Norm, RowLinear
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.ops.long_conv import convolve
from hyena_dist.ops.online_conv import OnlineConvolution
from hyena_dist.ops.precision import compute_dtype, without_autocast
from hyena_dist.ops.short_conv import ShortConvTape


class Linear:
    """A product with the norm before it, [..., I] -> [..., O], without autograd, in the dtype that the model multiplies
    in: of one token calls and conversions cost more than the arithmetic."""

    def __init__(self, module: ColumnLinear | RowLinear, norm: Norm | None = None) -> None:
        weight, bias = module.weight.detach(), module.bias.detach()
        self.dtype = weight.dtype if weight.dtype == torch.float64 else module.config.compute_dtype or weight.dtype
        self._weight, self._bias = weight.to(self.dtype), bias.to(self.dtype)
        self._norm = None if norm is None else ((len(norm.weight),), norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self._norm is not None:
            x = F.layer_norm(x, *self._norm)
        return F.linear(x.to(self.dtype), self._weight, self._bias)


class HyenaMemory:
    """The short convolution's last K - 1 inputs, and the long convolutions' state (`ops.online_conv`)."""

    def __init__(self, mixer: nn.Module, norm: Norm, rows: Tensor, room: int) -> None:
        self._mixer, self._norm, self._rows, self._room = cast("HyenaMixer", mixer), norm, rows, room
        short, channels, filters = self._mixer.short_conv, self._mixer.channels, self._mixer.config.num_filters
        self._dtype = compute_dtype(short.weight)
        self._taps = short.weight.detach().to(self._dtype).t().contiguous()  # [K, (N + 1) C]
        self._tap_bias = short.bias.detach().to(self._dtype)
        self._widths = [channels] * (filters + 2)
        self._filters = [slice(number * channels, (number + 1) * channels) for number in range(filters)]
        self._in, self._out = Linear(self._mixer.in_proj, norm), Linear(self._mixer.out_proj)

    def read(self, prompts: list[Tensor]) -> list[Tensor]:
        """See `MixerMemory`."""
        mixer, before = self._mixer, len(self._taps) - 1
        filters = mixer.filter([slice(0, max(map(len, prompts)) + self._room)]).to(self._dtype)  # [N - 1, C, lags]
        bias = mixer.conv_bias.detach().to(self._dtype).view(len(filters), -1)
        found, tails, carried = [], [], []
        for x in prompts:
            p = mixer.in_proj(x, self._norm).permute(1, 2, 0).to(self._dtype).contiguous()  # [1, (N + 1) C, P]
            tails.append(F.pad(p[..., max(len(x) - before, 0):], (max(before - len(x), 0), 0)))
            with without_autocast(x):
                u, later = self._mix(p, filters, bias)
            carried.append(later)
            found.append(mixer.out_proj(u.permute(2, 0, 1).to(self._in.dtype)))
        now = filters[..., : self._room].clone()
        now[..., 0] += bias  # the direct term is one more value of the present token's own lag
        self._tail = torch.cat(tails)[self._rows].movedim(2, 0).contiguous()  # [K - 1, B, (N + 1) C]
        self._convolution = OnlineConvolution(now.flatten(0, 1), torch.cat(carried)[self._rows])
        return found

    def _mix(self, p: Tensor, filters: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """p [1, (N + 1) C, P] -> u [1, C, P], and what the prompt adds to each later output of each long convolution,
        [1, (N - 1) C, n]."""
        length = p.shape[2]
        short = ShortConvTape(self._mixer.short_conv.weight, self._mixer.short_conv.bias, self._dtype)
        *gates, u = short.forward(p, slice(None)).chunk(len(filters) + 2, dim=1)
        u, carried = u * gates.pop(), []
        for h, b in zip(filters, bias, strict=True):
            # Zeros behind the prompt: there the convolution is what the prompt alone adds.
            y = convolve(F.pad(u, (0, self._room)), h[:, : length + self._room], b)
            carried.append(y[..., length:])
            u = y[..., :length] * gates.pop()
        return u, torch.cat(carried, dim=1)

    def step(self, x: Tensor) -> Tensor:
        """See `MixerMemory`."""
        window = torch.cat([self._tail, self._in(x).to(self._dtype)])  # [K, B, (N + 1) C]
        self._tail = window[1:]
        *gates, u = (window * self._taps[:, None]).sum(0).add_(self._tap_bias).split(self._widths, 1)
        u = u * gates.pop()
        for rows in self._filters:
            u = self._convolution.step(rows, u) * gates.pop()
        self._convolution.advance()
        return self._out(u[None])


class AttentionMemory:
    """Keys, turned to their positions, and values of every token."""

    def __init__(self, mixer: nn.Module, norm: Norm, rows: Tensor, room: int) -> None:
        self._mixer, self._norm, self._rows, self._room = cast("AttentionMixer", mixer), norm, rows, room
        self._heads = self._mixer.local_heads
        self._in, self._out = Linear(self._mixer.qkv_proj, norm), Linear(self._mixer.out_proj)

    def _by_head(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[l, B, 3 D] -> q, k and v, each [B, H, l, Dh]."""
        q, k, v = qkv.unflatten(-1, (3, self._heads, -1)).permute(2, 1, 3, 0, 4)
        return q, k, v

    def read(self, prompts: list[Tensor]) -> list[Tensor]:
        """See `MixerMemory`."""
        longest = max(map(len, prompts))
        found, kept = [], []
        for x in prompts:
            q, k, v = self._by_head(self._mixer.qkv_proj(x, self._norm))
            q, k = rotary(q, 0), rotary(k, 0)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            found.append(self._mixer.out_proj(y.permute(2, 0, 1, 3).flatten(2)))
            kept.append(F.pad(torch.stack((k, v)), (0, 0, 0, longest + self._room - len(x))))
        self._kept = torch.cat(kept, dim=1)[:, self._rows]  # [2, B, H, longest + n, Dh]
        self._places = torch.tensor([len(x) for x in prompts], device=self._rows.device)[self._rows]  # [B], of the next
        self._filled, self._every = longest, torch.arange(len(self._rows), device=self._rows.device)
        return found

    def step(self, x: Tensor) -> Tensor:
        """See `MixerMemory`."""
        q, k, v = self._by_head(self._in(x))
        q, k = rotary(q, self._places[:, None]), rotary(k, self._places[:, None])
        self._kept[:, self._every, :, self._places] = torch.stack((k, v))[..., 0, :].movedim(1, 0)
        self._filled += 1
        keys, values = self._kept[..., : self._filled, :]
        seen = torch.arange(self._filled, device=x.device) <= self._places[:, None]  # [B, filled]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
        self._places = self._places + 1
        return self._out(y.permute(2, 0, 1, 3).flatten(2))
