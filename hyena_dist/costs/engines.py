"""What an engine holds of the weights on one rank, and what it sends in an optimizer step, by formula.

Legend: w bytes of the rank's weights in float32, n ranks over which gradients are averaged and ZeRO shards.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.kinds import kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import FP32, Shape, ring

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a weight whole between steps (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class Layout:
    """How many ranks there are of each kind, and micro-batches of a step."""

    tensor: int
    context: int
    data: int
    micro_batches: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> "Layout":
        parallel, train = config.parallel, config.train
        data = world_size // (parallel.tensor * parallel.context)
        return cls(parallel.tensor, parallel.context, data, accumulation_steps(
            global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size, data_ranks=data))

    @property
    def shards(self) -> int:
        """Ranks over which gradients are averaged and ZeRO shards."""
        return self.data * self.context


class Weights(NamedTuple):
    """Shapes of the weights of one tensor rank, by the module that FSDP2 gathers: each block, and the rest."""

    blocks: list[list[Shape]]
    rest: list[Shape]

    @property
    def all(self) -> list[Shape]:
        return [shape for block in self.blocks for shape in block] + self.rest


@lru_cache(maxsize=64)
def weights(section: ModelSection, tensor: int = 1) -> Weights:
    """Of a model on one of this many tensor ranks."""
    D, inner, rows = section.hidden_size, section.inner_size // tensor, section.padded_vocab_size // tensor
    around = [*map(Shape, [(D,)] * 4), Shape((inner, D)), Shape((inner,)), Shape((D, inner)), Shape((D,))]
    mixers = {letter: mixer_kind(letter).shapes(section, tensor) for letter in kinds_of(section)}
    embedding = [Shape((rows, D))] * (1 if section.tie_embeddings else 2)
    return Weights([[*mixers[letter], *around] for letter in section.layer_kinds],
                   [*embedding, Shape((D,)), Shape((D,))])


@lru_cache(maxsize=64)
def parameters(section: ModelSection, tensor: int = 1) -> int:
    """Number of the weights of one tensor rank; embedding and head share theirs where they are tied."""
    return sum(shape.size for shape in weights(section, tensor).all)


class Held(NamedTuple):
    """Bytes of a rank, by what they are, and by when in a step they are there."""

    weights: float
    optimizer: float
    """Moments, and the engine's own copy of the weights that it steps."""
    copies: float
    """Other copies of weights: flat ones, and those that are gathered for a pass."""
    waiting: float
    """Gradients, and buckets of them, that wait while the next micro-batch is computed."""
    gradients: float
    """At the end of the last backward pass, when the activations are gone."""
    buckets: float
    """Beside them."""

    @property
    def kept(self) -> float:
        """What is there in every pass."""
        return self.weights + self.optimizer + self.copies

    @property
    def update(self) -> float:
        """What is there when gradients are averaged and the weights change."""
        return self.kept + self.gradients + self.buckets


def held(w: float, engine: EngineSection | None, *, shards: int = 1, micro_batches: int = 1,
         largest_block: float = 0.0) -> Held:
    """What an engine holds of weights of w bytes on its device; None: a loop of plain torch. With offloading the
    optimizer's state, and the weights where they are moved too, are on the host; gradients are counted here.

    Args:
        largest_block: bytes of the weights of the largest block, which FSDP2 gathers at a time, and of which ZeRO 1
            has the gradients besides while it fills its bucket.
    """
    n, several = shards, micro_batches > 1
    if engine is None:
        return Held(w, 2 * w, 0.0, w, w, 0.0)
    found = (_fsdp(w, n, several, largest_block) if engine.name == "fsdp" else
             _zero(engine.zero_stage, w, n, several, largest_block))
    if engine.offload == "none":
        return found
    return found._replace(optimizer=0.0, weights=0.0 if engine.offload == "parameters" else found.weights)


def _zero(stage: int, w: float, n: int, several: bool, largest_block: float) -> Held:
    """Of a stage of DeepSpeed."""
    gathered = w if n > 1 else 0.0
    return {
        0: Held(w, 2 * w, 0.0, w * several, w, w),
        1: Held(w, 3 * w / n, 0.0, 2 * w * several, w, w + largest_block),
        2: Held(w, 3 * w / n, 0.0, w / n * several, w + w / n * several, w),
        3: Held(w / n, 3 * w / n, w + w / n + gathered, w * several, w, 0.0),
    }[stage]


def _fsdp(w: float, n: int, several: bool, block: float) -> Held:
    """Shards, and of about three blocks whole weights or gradients: the one that is computed, the next, which is
    gathered ahead, and the gradients of the one before. Gradients that are not averaged yet stay whole."""
    return Held(w / n, 2 * w / n, 3 * block, w * several, w / n, 0.0)


def engine_traffic(config: Config, layout: Layout) -> Counter[tuple[str, str]]:
    """Bytes that a rank sends for its engine in an optimizer step."""
    shapes, n, engine = weights(config.model, layout.tensor), layout.shards, config.engine
    sent: Counter[tuple[str, str]] = Counter()
    whole = sum(shape.size for shape in shapes.all)
    if engine.name == "fsdp":
        # Weights are cut by rows: those of a rank are padded to as many as the first has.
        padded = sum(-(-shape.rows // n) * n * (shape.size // shape.rows) for shape in shapes.all)
        sent["data", "all_gather"] = layout.micro_batches * 2 * ring("all_gather", FP32 * padded // n, n)
        sent["data", "reduce_scatter"] = ring("reduce_scatter", FP32 * padded, n)
        return sent + _norm(layout, 8, shards=True)
    if engine.zero_stage == 0:
        sent["data", "all_reduce"] = ring("all_reduce", FP32 * whole, n)
        return sent + _norm(layout, 8, shards=False)
    if engine.zero_stage == 3:
        pieces = {size: FP32 * -(-size // n) for size in {shape.size for shape in shapes.all}}
        small = sum(pieces[shape.size] for shape in shapes.all if shape.size <= PERSISTENT)
        large = sum(pieces[shape.size] for shape in shapes.all if shape.size > PERSISTENT)
        # Small weights are gathered once a step; large ones in each forward pass, and kept until the backward pass.
        sent["data", "all_gather"] = (n - 1) * (small + layout.micro_batches * large)
        sent["data", "reduce_scatter"] = layout.micro_batches * (n - 1) * (small + large)
        return sent + _norm(layout, 16, shards=True)
    times = layout.micro_batches if engine.zero_stage == 2 else 1
    sent["data", "all_reduce"] = times * ring("all_reduce", FP32 * whole, n)
    # The flat weights of each optimizer group are padded, so that every rank has an even number of them.
    groups = [sum(shape.size for shape in shapes.all if shape.decayed is decayed) for decayed in (True, False)]
    sent["data", "all_gather"] = sum(ring("all_gather", FP32 * math.ceil(size / (2 * n)) * 2, n) for size in groups)
    return sent + _norm(layout, 8, shards=True)


def _norm(layout: Layout, size: int, *, shards: bool) -> Counter[tuple[str, str]]:
    """Of the global gradient norm, and where DeepSpeed asks whether it is finite."""
    found = {("tensor", "all_reduce"): ring("all_reduce", size, layout.tensor)}
    if shards:
        found["data", "all_reduce"] = ring("all_reduce", size, layout.shards)
    return Counter(found)
