"""Causal multi-head self-attention (`model.attention`).

Legend of the formulas: T = B L tokens, D channels, E bytes of an element of a product.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hyena_dist.config.advice import Misfit, Problem
from hyena_dist.config.checks import Use
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.kinds import MixerKind, MixerMemory, MixerModule, Working
from hyena_dist.model.kinds.formulas import FP32, WHOLE, Part, Shape, Split, product, product_bytes, ring

if TYPE_CHECKING:
    import torch

    from hyena_dist.model.config import HyenaConfig
    from hyena_dist.model.placement import Weights


ATTENTION_EXCHANGE = 3
"""Tensors as wide as q that exchanges of gradients between context ranks work in."""


class AttentionKind(MixerKind):
    """See the module."""

    knows_segments = True

    def module(self) -> MixerModule:
        from hyena_dist.model.attention import AttentionMixer
        return AttentionMixer

    def memory_of_tokens(self) -> type[MixerMemory]:
        from hyena_dist.model.memories import AttentionMemory
        return AttentionMemory

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

    def shapes(self, section: ModelSection, tensor: int) -> list[Shape]:
        D, C = section.hidden_size, section.hidden_size // tensor
        return [Shape((3 * C, D)), Shape((3 * C,)), Shape((D, C)), Shape((D,))]

    def parts(self, section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
        """Two products over the lower triangle: causal kernels skip the upper one."""
        D, tokens = section.hidden_size, batch * seq_len
        return {"projections": product(tokens, D, 3 * D) + product(tokens, D, D),
                "attention": Part(2 * 2.0 * batch * D * seq_len * (seq_len + 1) / 2, 3 * tokens * D, tokens * D)}

    def memory(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, wide: bool,  # noqa: ARG002
               device: "torch.device", split: Split = WHOLE,  # noqa: ARG002 - everywhere the same
               backend: str = "auto") -> Working:  # noqa: ARG002
        """Saves x; q, k and v, q and k with their positions, and the heads' output in both layouts; cosines and sines
        for q and for k, and a number of every token and head. A fused kernel has no [L, L] matrix. Works in the
        gradients of q, k and v in two layouts, and over context ranks in what they are sent in."""
        D, heads, E = section.hidden_size // split.tensor, section.num_attention_heads // split.tensor, itemsize
        length = -(-seq_len // split.context)
        tokens, across = batch * length, split.context > 1
        stream, lane = FP32 * tokens * section.hidden_size, E * tokens * D
        cosines = FP32 * 2 * length * (section.hidden_size // section.num_attention_heads)
        exchanged = across * ATTENTION_EXCHANGE * lane
        summed = stream if split.tensor > 1 else 0.0  # the gradient at x, in a copy
        return Working(stream + 7 * lane + FP32 * tokens * heads + cosines, stream + 6 * lane + exchanged + summed,
                       exchanged)

    def exchanged(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, split: Split,
                  rank: int | None) -> dict[str, tuple[int, int]]:  # noqa: ARG002 - the same on every rank
        """q, k and v one way, what comes of them the other; their gradients the same."""
        lane = itemsize * batch * (seq_len // split.context) * (section.hidden_size // split.tensor)
        sent = ring("all_to_all", 3 * lane, split.context) + ring("all_to_all", lane, split.context)
        return {"all_to_all": (sent, sent)}

    def moved(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int) -> dict[str, float]:
        D, E, tokens = section.hidden_size, itemsize, batch * seq_len
        return {"projections": product_bytes(tokens, D, 3 * D, E) + product_bytes(tokens, D, D, E),
                "attention": 12 * E * tokens * D}


KIND = AttentionKind()
