"""The Hyena operator of order N, with its long implicit convolutions (`model.mixer`).

Legend of the formulas: T = B L tokens, D channels, N order, F width of the filter's trunk, E bytes of an element of a
product.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hyena_dist.config.advice import Misfit, Problem
from hyena_dist.config.checks import Use
from hyena_dist.config.context import deals_out, exchanged_rows
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.kinds import MixerKind, MixerMemory, MixerModule, Repeated, Working
from hyena_dist.model.kinds.formulas import FP32, WHOLE, Part, Shape, Split, fft_flops, product, product_bytes

if TYPE_CHECKING:
    import torch

    from hyena_dist.model.config import HyenaConfig
    from hyena_dist.model.placement import Weights

KERNELS_ROW, KERNELS_FILTER, KERNELS_LEFT = 8, (8, 16), 14
"""Bytes of Triton's kernels in the backward pass (`ops.triton.plans.GROUP_ELEMENTS`): for every element of a group of
channels, and for every element of the group's filters where the batch is one row and where it is several; and for every
element when the filters' gradients have left. `auto` takes the kernels where they were measured."""

CHUNK, FILTER_CHUNK = 14, 5
"""Float32 tensors of one chunk that live at a time in the backward pass, and more of them for each of the filters. A
complex one counts as two."""


CUFFT = 8
"""Bytes that cuFFT works in for every element of a chunk: a complex copy of it."""

HALF_CHUNK = 2.5
"""The same, where products are in half precision, of copies in float32."""

ACROSS_CHUNK, ACROSS_FILTER, ACROSS_HALF = 3.5, 7, 4
"""The same over context ranks by all_to_all, and more of them for every element of the chunk's filters."""

DISTRIBUTED_CHUNK = 8.4
"""The same by distributed_fft, of all rows that are transformed together."""


class HyenaKind(MixerKind):
    """See the module."""

    exports = frozenset({"published", "huggingface", "megatron"})
    knows_segments = True

    def module(self) -> MixerModule:
        from hyena_dist.model.mixer import HyenaMixer
        return HyenaMixer

    def memory_of_tokens(self) -> type[MixerMemory]:
        from hyena_dist.model.memories import HyenaMemory
        return HyenaMemory

    def weights(self, config: "HyenaConfig") -> "Weights":
        from hyena_dist.model.placement import ZERO, Constant, Normal, Placement, Uniform, column, row
        gates = (*(f"x{i}" for i in range(config.hyena_order)), "v")  # the published order
        filters = tuple(f"h{i}" for i in range(config.num_filters))
        return {
            **column("in_proj", gates),
            r"short_conv\.(weight|bias)": Placement(tp_dim=0, parts=gates, initial=Uniform(config.short_conv_kernel)),
            "conv_bias": Placement(tp_dim=0, parts=filters, initial=Normal(1)),
            r"filter\.freq": Placement(weight_decay=False, initial=Constant(config.filter_sine_freq)),
            r"filter\.trunk_weight_\d+": Placement(weight_decay=False),
            r"filter\.trunk_bias_\d+": Placement(weight_decay=False, initial=ZERO),
            r"filter\.last_weight": Placement(tp_dim=0, parts=filters, weight_decay=False),
            **row("out_proj", config.num_layers),
        }

    def refuses(self, use: Use) -> Iterator[Problem]:
        """Over context ranks: the exchange deals out whole rows, and the short convolution reaches into one neighbour
        only."""
        model, parallel, ranks = use.model, use.parallel, use.parallel.context
        if ranks == 1 or model.hidden_size % parallel.tensor:
            return
        channels = model.hidden_size // parallel.tensor
        if channels % parallel.overlap_groups:
            yield Misfit(f"model.hidden_size / parallel.tensor ({channels}) is not a multiple of "
                         f"parallel.overlap_groups ({parallel.overlap_groups})", "parallel.overlap_groups")
        elif use.packed and parallel.context_method == "distributed_fft":
            yield ("parallel.context_method=distributed_fft does not keep the contigs of a packed window apart: set "
                   "parallel.context_method=all_to_all, parallel.context=1, or data.pack=false")
        elif use.packed or parallel.context_method == "all_to_all":
            yield from _undealt(use, channels)
        least = ranks * (model.short_conv_kernel - 1)
        for key, length in use.lengths.items():
            if length < least:
                reachable = least <= model.max_seq_len
                remedy = (f"use {least} or more" if reachable else
                          "lower parallel.context, or raise model.max_seq_len too")
                yield (f"{key} ({length}) is too short for parallel.context ({ranks}) ranks: each needs at least "
                       f"model.short_conv_kernel - 1 tokens: {remedy}")

    def shapes(self, section: ModelSection, tensor: int) -> list[Shape]:
        D, C, N, F = section.hidden_size, section.hidden_size // tensor, section.hyena_order, section.filter_order
        width, filters = (N + 1) * C, (N - 1) * C
        trunk = [Shape((F,), decayed=False)]
        for layer in range(section.filter_num_inner_mlps + 1):
            trunk += [Shape((F, F if layer else section.filter_emb_dim), decayed=False), Shape((F,), decayed=False)]
        return [Shape((width, D)), Shape((width,)), Shape((width, section.short_conv_kernel)), Shape((width,)),
                *trunk, Shape((filters, F), decayed=False), Shape((filters,)), Shape((D, C)), Shape((D,))]

    def parts(self, section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
        """The filter is generated, and transformed, once for all sequences of a micro-batch."""
        from scipy.fft import next_fast_len
        D, order, taps = section.hidden_size, section.hyena_order, section.short_conv_kernel
        filters, width, tokens = order - 1, section.filter_order, batch * seq_len
        sizes = [section.filter_emb_dim, *[width] * (section.filter_num_inner_mlps + 1), filters * D]
        weights = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
        # Real channels as complex numbers of as many points: u and y of every sequence, h once.
        transforms = filters * D * (2 * batch + 1)
        channels = (order + 1) * D
        return {
            "projections": product(tokens, D, channels) + product(tokens, D, D),
            "short_conv": Part(2.0 * taps * tokens * channels, channels * (tokens + taps + 1), tokens * channels),
            "filter": Part(2.0 * seq_len * weights, weights, filters * D * seq_len),
            "long_conv": Part(transforms * fft_flops(next_fast_len(seq_len)),
                              filters * D * (2 * tokens + seq_len + 1), filters * D * tokens),
        }

    def repeated(self, section: ModelSection, seq_len: int, batch: int) -> Repeated:
        """The filter's trunk and the first projection. The spectra, which are repeated at every value, are counted with
        the passes of training."""
        from hyena_dist.ops.implicit_filter import keeps_trunk
        D, width = section.hidden_size, section.filter_order
        trunk = 2.0 * seq_len * width * (section.filter_emb_dim + section.filter_num_inner_mlps * width)
        projection = product(batch * seq_len, D, (section.hyena_order + 1) * D).flops
        return Repeated(0.0 if keeps_trunk(seq_len) else trunk, projection + trunk)

    def memory(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, wide: bool,
               device: "torch.device", split: Split = WHOLE, backend: str = "auto") -> Working:
        """Saves x, the filters, and where `wide` things are kept the projection and the trunk; works in the gradients
        of its output, input and filters, in the projection where it was not kept, and in chunks of at least one
        channel. Over context ranks it saves what was exchanged too, and no trunk."""
        from hyena_dist.ops.chunking import transform_elements
        from hyena_dist.ops.implicit_filter import keeps_trunk
        D, N, E = section.hidden_size // split.tensor, section.hyena_order, itemsize
        length = -(-seq_len // split.context)
        tokens = batch * length
        stream, lane, filters = FP32 * tokens * section.hidden_size, E * tokens * D, FP32 * (N - 1) * D * length
        projection = (N + 1) * lane
        if split.context > 1:
            kept = (2 * N - 2) * lane  # what the convolutions read, the inner ones' results, and the last one's
            chunk, elements = _across_chunk(section, seq_len, batch, itemsize=E, device=device, split=split)
            exchanged = N * lane
            return Working(stream + filters + kept + wide * projection,
                           2 * stream + lane + (not wide) * projection + filters + chunk + exchanged, exchanged,
                           CUFFT * elements if device.type == "cuda" else 0.0)
        activations = section.filter_emb_dim + 3 * (section.filter_num_inner_mlps + 1) * section.filter_order
        trunk = FP32 * activations * seq_len + filters if keeps_trunk(seq_len) else 0  # and the filters' window
        elements = min(D * tokens, max(tokens, transform_elements(seq_len, device)))
        by_kernels = device.type == "cuda" and _by_kernels(section, seq_len, E, backend)
        chunk = _chunk(section, seq_len, batch, elements, itemsize=E, by_kernels=by_kernels)
        plans = CUFFT * elements if device.type == "cuda" and not by_kernels else 0.0
        return Working(stream + filters + wide * (projection + trunk),
                       2 * stream + (not wide) * projection + filters + chunk, plans=plans)

    def exchanged(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, split: Split,
                  rank: int | None) -> dict[str, tuple[int, int]]:
        """all_to_all moves u, the gates between two convolutions, and the result back; distributed_fft moves u and y as
        they are and three spectra, or five backward, as complex numbers of float32. The halo goes to the right in the
        forward pass, and its gradient to the left."""
        N, P, D = section.hyena_order, split.context, section.hidden_size // split.tensor
        if P == 1:
            return {}
        away = D * (seq_len // P) * (P - 1) // P
        if split.method == "all_to_all":
            sent = (N * batch * itemsize * away,) * 2
        else:
            sent = ((N - 1) * (2 * batch * itemsize + 8 * (2 * batch + 1)) * away,
                    (N - 1) * (3 * batch * itemsize + 8 * (3 * batch + 2)) * away)
        halo = (section.short_conv_kernel - 1) * (N + 1) * D * batch * itemsize
        to_right, to_left = (rank is None or rank < P - 1), (rank > 0 if rank is not None else P > 2)
        return {"all_to_all": sent, "halo": (halo * to_right, halo * to_left)}

    def shared(self, section: ModelSection) -> list[int]:
        """Of the filter's trunk."""
        return [shape.size for shape in self.shapes(section, 1) if not shape.decayed][:-1]

    def moved(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int) -> dict[str, float]:
        D, N, E, tokens = section.hidden_size, section.hyena_order, itemsize, batch * seq_len
        filters, width, taps = FP32 * (N - 1) * D * seq_len, section.filter_order, section.short_conv_kernel
        trunk = width * (section.filter_emb_dim + 1 + section.filter_num_inner_mlps * (width + 1) + (N - 1) * D)
        return {
            "projections": product_bytes(tokens, D, (N + 1) * D, E) + product_bytes(tokens, D, D, E),
            "short_conv": 5 * E * tokens * (N + 1) * D + 3 * FP32 * (N + 1) * D * (taps + 1),
            "filter": 2 * filters + 3 * FP32 * trunk,
            "long_conv": 5 * E * tokens * (N - 1) * D + 3 * filters,
            "gates": N * 8 * E * tokens * D,  # a product reads two and writes one; backward three and two
        }


def _by_kernels(section: ModelSection, seq_len: int, itemsize: int, backend: str) -> bool:
    """Whether Triton's kernels compute the operator in half precision on a GPU; with `auto`, one that they were
    measured on."""
    from hyena_dist.ops.triton.plans import measured
    if itemsize == FP32 or backend not in ("auto", "triton"):
        return False
    return backend == "triton" or (section.hyena_order == 2 and measured(seq_len))


def _chunk(section: ModelSection, seq_len: int, batch: int, elements: int, *, itemsize: int,
           by_kernels: bool) -> float:
    """Bytes of what lives as long as a chunk of this many elements of one tensor, in the backward pass."""
    if by_kernels:
        from hyena_dist.ops.triton.plans import GROUP_ELEMENTS
        tokens, width = batch * seq_len, section.hidden_size
        group = min(tokens * width, max(tokens, GROUP_ELEMENTS))
        return max(KERNELS_LEFT, KERNELS_ROW + KERNELS_FILTER[batch > 1] / batch) * group
    lowered = HALF_CHUNK if itemsize < FP32 else 0.0
    return (CHUNK + (section.hyena_order - 1) * FILTER_CHUNK + lowered) * FP32 * elements


def _across_chunk(section: ModelSection, seq_len: int, batch: int, *, itemsize: int, device: "torch.device",
                  split: Split) -> tuple[float, int]:
    """The same over context ranks, and the elements of the chunk."""
    from hyena_dist.ops.chunking import transform_elements
    from hyena_dist.parallel.distributed_fft import part_elements
    D, length = section.hidden_size // split.tensor, -(-seq_len // split.context)
    if split.method == "all_to_all":
        elements = min(D * batch * length, max(seq_len, transform_elements(seq_len, device)))
        lowered = ACROSS_HALF if itemsize < FP32 else 0.0
        return (ACROSS_CHUNK + ACROSS_FILTER / batch + lowered) * FP32 * elements, elements
    # Rows of u, dy and h of some channels go through the four-step transform together, as complex numbers.
    rows = 2 * batch + 1
    elements = min(rows * length * D, part_elements(rows * length, device))
    return DISTRIBUTED_CHUNK * FP32 * elements, elements


def _undealt(use: Use, channels: int) -> Iterator[Problem]:
    """The micro-batches whose rows the all-to-all cannot deal out to the context ranks."""
    ranks = use.parallel.context
    free = f"set parallel.context_method=distributed_fft{' and data.pack=false' if use.packed else ''}"
    for key, batch in use.batches.items():
        rows = exchanged_rows(channels=channels, batch=batch, groups=use.parallel.overlap_groups)
        if deals_out(rows, ranks):
            continue
        text = f"channels x {key} of an overlap group ({rows}) is not a multiple of parallel.context ({ranks})"
        # A stage of a warm-up stands in a list, of which no other value is tried.
        yield Misfit(text, key, otherwise=free) if key == "train.micro_batch_size" else f"{text}: {free}"


KIND = HyenaKind()
