"""AttentionMixer: causal multi-head self-attention where Megatron expects `self_attention`, for "A" in layer_pattern.

Legend: L tokens, l of them on a context rank, B batch, D channels, H heads on a tensor rank, Dh channels of a head,
P context ranks, T tensor ranks. Megatron's layout [l, B, D] outside, [B, H, l, Dh] inside.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.initial import initialize_part, layer_name
from hyena_dist.model.layers import (
    ColumnLinear,
    Norm,
    RowLinear,
    refuse_arguments,
    refuse_shape,
)
from hyena_dist.ops.precision import compute_dtype, without_autocast
from hyena_dist.ops.segments import Offsets, Segments, segments_of
from hyena_dist.parallel.collectives import Exchange
from hyena_dist.parallel.groups import Axis, context_axis, tensor_axis

ROTARY_BASE = 10000.0


def rotary(x: Tensor, start: int | Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in the rotate-half form: with theta_i = 10000^(-2i / Dh), i < Dh/2, channels i
    and i + Dh/2 of the token at position t turn together by the angle t theta_i.

    x [B, H, l, Dh] -> the same shape and dtype. Its first token is at the global position `start`; or `start` [B, l]
    has the position of each token. Angles are in
    float64, because one of 10^5 in float32 is wrong in the second digit of its sine; products are in float32, in
    float64 for float64 input, whatever the autocast around.
    """
    dtype = compute_dtype(x)
    length, width = x.shape[-2:]
    with without_autocast(x):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width
        positions = (start[:, None].double() if isinstance(start, Tensor) else
                     torch.arange(start, start + length, dtype=torch.float64, device=x.device))
        angles = positions[..., None] * ROTARY_BASE**-exponents
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        first, second = x.to(dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def context_attention(q: Tensor, k: Tensor, v: Tensor, context: Axis, segments: Segments | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(Dh)) v with rotary positions, over a sequence cut into contiguous slices.

    q, k, v [B, H, l, Dh], the tokens from `context.rank * l` on -> [B, H, l, Dh]. For the product each context rank
    has all tokens of its share of the heads, [B, H / P, P l, Dh], by one all-to-all there and one back; P = 1 has none.

    Raises:
        ValueError: P does not divide H.
    """
    size, heads = context.size, q.shape[1]
    if heads % size:
        raise ValueError(f"attention exchanges heads for tokens: {heads} heads (model.num_attention_heads / "
                         f"parallel.tensor) cannot be shared by parallel.context={size} ranks")
    start = (context.rank * q.shape[2] if segments is None else
             segments.positions(q.device).chunk(size, dim=1)[context.rank])
    q, k = rotary(q, start), rotary(k, start)
    if size == 1:
        return _attend(q, k, v, segments)
    # [3, B, H, l, Dh] -> [P, 3, B, H/P, l, Dh], exchanged -> [3, B, H/P, P l, Dh]
    local = torch.stack((q, k, v)).unflatten(2, (size, -1)).movedim(2, 0)
    q, k, v = Exchange(local, context).wait().movedim(0, 3).flatten(3, 4)
    y = _attend(q, k, v, segments)
    # [B, H/P, P l, Dh] -> [P, B, H/P, l, Dh], exchanged -> [B, H, l, Dh]
    return Exchange(y.unflatten(2, (size, -1)).movedim(2, 0), context).wait().movedim(0, 1).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """Causal softmax(q k^T / sqrt(Dh)) v of whole rows [B, H, L, Dh], or of each segment alone. Padding stands behind a
    segment, where no token of the segment sees it."""
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = []
    for group in segments.groups(q.device):
        # [B, H, L, Dh] -> [G, H, size, Dh]
        of_q, of_k, of_v = (x.transpose(1, 2).flatten(0, 1).index_select(0, group.tokens.flatten())
                            .unflatten(0, group.tokens.shape).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=True)
        found.append(y.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(found).index_select(0, segments.places(q.device))
    return rows.unflatten(0, (segments.batch, -1)).transpose(1, 2)


class AttentionMixer(nn.Module):
    """Causal multi-head self-attention on [l, B, D], with the constructor and the call of HyenaMixer:

        q | k | v = qkv_proj(x);   out = out_proj(heads of softmax(rotary(q) rotary(k)^T / sqrt(Dh)) v)

    Rows of qkv_proj are three blocks q | k | v, each of which is split by heads over the tensor ranks. What stands on
    the right is padding that no token before it sees, so there is no mask: Megatron's other arguments must be None.

    Args:
        layer_number, seed: as HyenaMixer's.
    """

    def __init__(self, config: HyenaConfig, layer_number: int, *,
                 pg_collection: ProcessGroupCollection | None = None, seed: int | None = 0) -> None:
        """Raises ValueError: the channels or the tensor ranks do not fit the number of heads."""
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.context = context_axis(pg_collection)
        width, heads, ranks = config.hidden_size, config.mixer_heads, tensor_axis(pg_collection).size
        if width % (2 * heads):
            raise ValueError(f"model.hidden_size={width} cannot be split into model.num_attention_heads={heads} heads "
                             "of an even number of channels")
        if heads % ranks:
            raise ValueError(f"model.num_attention_heads={heads} cannot be split over parallel.tensor={ranks} ranks")
        self.local_heads = heads // ranks
        self.qkv_proj = ColumnLinear(width, 3 * width, config=config, pg_collection=pg_collection)
        self.out_proj = RowLinear(width, width, config=config, pg_collection=pg_collection)
        initialize_part(self, f"{layer_name(layer_number)}.mixer", config, self.qkv_proj.axis, seed)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, norm: Norm | None = None,
                residual: bool = False, segments: Offsets | Segments | None = None,
                **attention_arguments: Any) -> tuple[Tensor, None]:
        """[l, B, D], under sequence parallelism [l / T, B, D] -> (the same shape, no bias left to add).

        Args:
            norm: the norm before the mixer, where it is not applied yet.
            residual: add hidden_states, not normalised.
            segments: as HyenaMixer's; a token sees those of its own segment.

        Raises:
            ValueError: an argument of attention that is not None, another width, more tokens than max_seq_len, segments
                that do not fit, or the context ranks do not divide the local heads.
        """
        refuse_arguments("AttentionMixer is causal by itself and", attention_mask=attention_mask, **attention_arguments)
        refuse_shape("AttentionMixer", hidden_states, self.config, self.context, self.qkv_proj.axis)
        qkv = self.qkv_proj(hidden_states, norm).unflatten(-1, (3, self.local_heads, -1))
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # [l, B, 3, H, Dh] -> 3 of [B, H, l, Dh]
        apart = segments_of(segments, q.shape[0], q.shape[2] * self.context.size)
        y = context_attention(q, k, v, self.context, apart)
        out = self.out_proj(y.permute(2, 0, 1, 3).flatten(2))
        return hidden_states + out if residual else out, None
