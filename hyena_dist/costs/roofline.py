"""The least that a training step can take, part by part: its fewest bytes and operations, by formula, and the time that
a card needs for them.

A part reads each of its inputs once and writes each of its outputs once, in the forward pass and again in the backward
pass, which reads what the forward pass read and the outputs' gradients, and writes the inputs'. An operator that does
two parts in one pass needs less than their sum.

Legend: B sequences of L tokens, T = B L, D channels, N order, V vocabulary, E bytes of an element of a product (2 in
half precision). The residual stream, the filters, the weights and the gradients of all three are float32.
"""

from collections.abc import Mapping
from functools import lru_cache

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.flops import TRAINING_PASSES, flops
from hyena_dist.model.kinds import kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import FP32, product_bytes
from hyena_dist.ops.costs import Cost

NORMS, PROJECTIONS, SHORT_CONV, FILTER, LONG_CONV, GATES, MLP = (
    "norms", "projections", "short convolution", "filter", "long convolution", "gates", "mlp")
ATTENTION, EMBEDDING, DROPOUT, HEAD, LOSS = "attention", "embedding", "dropout", "head", "loss"
OPTIMIZER, ENGINE = "optimizer", "engine"
PARTS = (EMBEDDING, NORMS, PROJECTIONS, SHORT_CONV, FILTER, LONG_CONV, GATES, ATTENTION, MLP, DROPOUT, HEAD, LOSS,
         ENGINE, OPTIMIZER)
"""In the order of a step."""

_NAMES = {"short_conv": SHORT_CONV, "long_conv": LONG_CONV}
"""Of parts that formulas of mixers call otherwise."""

INT64 = 8

COPY_BYTES_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}
"""Read and written together by a large copy: the most that an operator that goes through memory reaches."""
PRODUCT_FLOPS = {"H100": {"bf16": 798e12, "fp16": 798e12, "fp32": 67e12},
                 "H200": {"bf16": 790e12, "fp16": 790e12, "fp32": 67e12}}
"""Of a large matrix product: measured in half precision, the maker's number in float32."""


def floor_seconds(cost: Cost, card: str, precision: str) -> float:
    """The least time of a card of COPY_BYTES_PER_SECOND: of what it moves or of what it computes, the longer."""
    return max(cost.bytes / COPY_BYTES_PER_SECOND[card], cost.flops / PRODUCT_FLOPS[card][precision])


@lru_cache(maxsize=64)
def fewest(section: ModelSection, seq_len: int, micro_batch_size: int = 1, *, precision: str = "fp32"
           ) -> Mapping[str, Cost]:
    """Of every part in a training step of a micro-batch, without dropout and without recomputation. Launches are not
    counted."""
    D, V, tokens, E = section.hidden_size, section.padded_vocab_size, micro_batch_size * seq_len, _size(precision)
    layers = section.num_layers
    stream, weights = FP32 * tokens * D, FP32 * parameters(section)
    norm = 3 * stream + 2 * E * tokens * D  # x twice, its gradient, and the norm and its gradient
    # A branch ends in a product that reads the stream and writes it, and not only its own result; its gradient is the
    # stream's. That the norm's backward pass adds to its own.
    residual = stream + 2 * (stream - E * tokens * D)
    mlp = product_bytes(tokens, D, section.inner_size, E) + product_bytes(tokens, section.inner_size, D, E) + residual
    moved: dict[str, float] = {
        EMBEDDING: 2 * stream + 2 * INT64 * tokens + 2 * FP32 * V * D,
        NORMS: (2 * layers + 1) * norm + 2 * layers * stream,
        MLP: layers * mlp,
        HEAD: product_bytes(tokens, D, V, E),
        LOSS: tokens * (3 * E * V + 2 * INT64),
        ENGINE: 3 * weights,  # the gradients, for their norm and for clipping
        OPTIMIZER: 7 * weights,  # the gradient; weight and moments, read and written
        PROJECTIONS: layers * residual,
    }
    for letter, count in kinds_of(section).items():
        for name, size in mixer_kind(letter).moved(section, seq_len, micro_batch_size, itemsize=E).items():
            part = _NAMES.get(name, name)
            moved[part] = moved.get(part, 0.0) + count * size
    work = {_NAMES.get(name, name): TRAINING_PASSES * count
            for name, count in flops(section, seq_len, micro_batch_size).items()}
    # A part that only a mixer of its own kind has comes last.
    return {part: Cost(moved[part], work.get(part, 0.0)) for part in dict.fromkeys([*PARTS, *moved]) if moved.get(part)}


def _size(precision: str) -> int:
    return FP32 if precision == "fp32" else 2
