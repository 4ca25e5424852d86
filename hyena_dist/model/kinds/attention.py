"""Causal multi-head self-attention (`model.attention`).

Legend of the formulas: T = B L tokens, D channels, E bytes of an element of a product.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hyena_dist.config.advice import Misfit, Problem
from hyena_dist.config.checks import Use
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.kinds import MixerKind, MixerModule, Working
from hyena_dist.model.kinds.formulas import FP32, Part, product, product_bytes

if TYPE_CHECKING:
    import torch

    from hyena_dist.model.config import HyenaConfig
    from hyena_dist.model.placement import Weights


class AttentionKind(MixerKind):
    """See the module."""

    knows_segments = True

    def module(self) -> MixerModule:
        from hyena_dist.model.attention import AttentionMixer
        return AttentionMixer

    def weights(self, config: "HyenaConfig") -> "Weights":
        from hyena_dist.model.placement import column, row
        return {**column("qkv_proj", ("q", "k", "v")), **row("out_proj", config.num_layers)}

    def refuses(self, use: Use) -> Iterator[Problem]:
        """It is split by heads, over tensor and context ranks, and positions turn channels in pairs."""
        model, heads = use.model, 2 * use.model.num_attention_heads
        if model.hidden_size % heads:
            yield Misfit(f"model.hidden_size ({model.hidden_size}) is not a multiple of 2 x model.num_attention_heads "
                         f"({heads})", "model.hidden_size", heads, otherwise="change model.num_attention_heads")
        ranks = use.parallel.tensor * use.parallel.context
        if model.num_attention_heads % ranks:
            yield Misfit(f"model.num_attention_heads ({model.num_attention_heads}) is not a multiple of "
                         f"parallel.tensor x parallel.context ({ranks})", "model.num_attention_heads", ranks,
                         otherwise="change parallel.tensor or parallel.context")

    def parameters(self, section: ModelSection) -> int:
        return 4 * section.hidden_size * (section.hidden_size + 1)

    def parts(self, section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
        """Two products over the lower triangle: causal kernels skip the upper one."""
        D, tokens = section.hidden_size, batch * seq_len
        return {"projections": product(tokens, D, 3 * D) + product(tokens, D, D),
                "attention": Part(2 * 2.0 * batch * D * seq_len * (seq_len + 1) / 2, 3 * tokens * D, tokens * D)}

    def memory(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, wide: bool,  # noqa: ARG002
               device: "torch.device") -> Working:  # noqa: ARG002 - at every value and on every device the same
        """Saves x; q, k and v, q and k with their positions, and the heads' output in both layouts; cosines and sines
        for q and for k, and a number of every token and head. A fused kernel has no [L, L] matrix. Works in the
        gradients of q, k and v in two layouts."""
        D, heads, E, tokens = section.hidden_size, section.num_attention_heads, itemsize, batch * seq_len
        stream = FP32 * tokens * D
        return Working(stream + 7 * E * tokens * D + FP32 * (tokens * heads + 2 * seq_len * D // heads),
                       stream + 6 * E * tokens * D)

    def moved(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int) -> dict[str, float]:
        D, E, tokens = section.hidden_size, itemsize, batch * seq_len
        return {"projections": product_bytes(tokens, D, 3 * D, E) + product_bytes(tokens, D, D, E),
                "attention": 12 * E * tokens * D}


KIND = AttentionKind()
