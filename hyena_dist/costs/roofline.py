"""The least that a training step can take, part by part: its fewest bytes and operations, by formula, and the time that
a card needs for them.

A part reads each of its inputs once and writes each of its outputs once, in the forward pass and again in the backward
pass, which reads what the forward pass read and the outputs' gradients, and writes the inputs'. An operator that does
two parts in one pass needs less than their sum.

Legend: B sequences of L tokens, T = B L, D channels, N order, V vocabulary, E bytes of an element of a product (2 in
half precision). The residual stream, the filters, the weights and the gradients of all three are float32.
"""

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.costs.flops import TRAINING_PASSES, flops, layer_kinds
from hyena_dist.costs.memory import parameters
from hyena_dist.ops.costs import Cost

NORMS, PROJECTIONS, SHORT_CONV, FILTER, LONG_CONV, GATES, MLP = (
    "norms", "projections", "short convolution", "filter", "long convolution", "gates", "mlp")
ATTENTION, EMBEDDING, DROPOUT, HEAD, LOSS = "attention", "embedding", "dropout", "head", "loss"
OPTIMIZER, ENGINE = "optimizer", "engine"
PARTS = (EMBEDDING, NORMS, PROJECTIONS, SHORT_CONV, FILTER, LONG_CONV, GATES, ATTENTION, MLP, DROPOUT, HEAD, LOSS,
         ENGINE, OPTIMIZER)
"""In the order of a step."""

FP32, INT64 = 4, 8

COPY_BYTES_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}
"""Read and written together by a large copy: the most that an operator that goes through memory reaches."""
PRODUCT_FLOPS = {"H100": {"bf16": 798e12, "fp16": 798e12, "fp32": 67e12},
                 "H200": {"bf16": 790e12, "fp16": 790e12, "fp32": 67e12}}
"""Of a large matrix product: measured in half precision, the maker's number in float32."""


def floor_seconds(cost: Cost, card: str, precision: str) -> float:
    """The least time of a card of COPY_BYTES_PER_SECOND: of what it moves or of what it computes, the longer."""
    return max(cost.bytes / COPY_BYTES_PER_SECOND[card], cost.flops / PRODUCT_FLOPS[card][precision])


def fewest(section: ModelSection, seq_len: int, micro_batch_size: int = 1, *, precision: str = "fp32"
           ) -> dict[str, Cost]:
    """Of every part in a training step of a micro-batch, without dropout and without recomputation. Launches are not
    counted."""
    D, V, tokens, E = section.hidden_size, section.padded_vocab_size, micro_batch_size * seq_len, _size(precision)
    layers, kinds = section.num_layers, layer_kinds(section)
    hyena, attention = kinds.count("H"), kinds.count("A")
    stream, weights = FP32 * tokens * D, FP32 * parameters(section)
    norm = 3 * stream + 2 * E * tokens * D  # x twice, its gradient, and the norm and its gradient
    # A branch ends in a product that reads the stream and writes it, and not only its own result; its gradient is the
    # stream's. That the norm's backward pass adds to its own.
    residual = stream + 2 * (stream - E * tokens * D)
    mlp = _product(tokens, D, section.inner_size, E) + _product(tokens, section.inner_size, D, E) + residual
    moved = {
        EMBEDDING: 2 * stream + 2 * INT64 * tokens + 2 * FP32 * V * D,
        NORMS: (2 * layers + 1) * norm + 2 * layers * stream,
        MLP: layers * mlp,
        HEAD: _product(tokens, D, V, E),
        LOSS: tokens * (3 * E * V + 2 * INT64),
        ENGINE: 3 * weights,  # the gradients, for their norm and for clipping
        OPTIMIZER: 7 * weights,  # the gradient; weight and moments, read and written
        **_hyena(section, seq_len, micro_batch_size, E, hyena),
    }
    moved[PROJECTIONS] = (hyena * (_product(tokens, D, (section.hyena_order + 1) * D, E) + _product(tokens, D, D, E))
                          + attention * (_product(tokens, D, 3 * D, E) + _product(tokens, D, D, E)) + layers * residual)
    if attention:
        moved[ATTENTION] = attention * 12 * E * tokens * D
    work = {part: TRAINING_PASSES * count for part, count in flops(section, seq_len, micro_batch_size).items()}
    names = {"short_conv": SHORT_CONV, "long_conv": LONG_CONV}
    work = {names.get(part, part): count for part, count in work.items()}
    return {part: Cost(moved[part], work.get(part, 0.0)) for part in PARTS if moved.get(part)}


def _hyena(section: ModelSection, seq_len: int, batch: int, E: int, layers: int) -> dict[str, float]:
    """Bytes of the parts between the projections, of all layers."""
    D, N, tokens = section.hidden_size, section.hyena_order, batch * seq_len
    filters, width, taps = FP32 * (N - 1) * D * seq_len, section.filter_order, section.short_conv_kernel
    trunk = width * (section.filter_emb_dim + 1 + section.filter_num_inner_mlps * (width + 1) + (N - 1) * D)
    return {
        SHORT_CONV: layers * (5 * E * tokens * (N + 1) * D + 3 * FP32 * (N + 1) * D * (taps + 1)),
        FILTER: layers * (2 * filters + 3 * FP32 * trunk),
        LONG_CONV: layers * (5 * E * tokens * (N - 1) * D + 3 * filters),
        GATES: layers * N * 8 * E * tokens * D,  # a product reads two and writes one; backward three and two
    }


def _product(tokens: int, inputs: int, outputs: int, E: int) -> float:
    """Bytes of a product with a weight, forward and backward."""
    return E * tokens * (3 * inputs + 2 * outputs) + 3 * FP32 * (inputs + 1) * outputs


def _size(precision: str) -> int:
    return FP32 if precision == "fp32" else 2
