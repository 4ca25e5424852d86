"""What a training step keeps in a device's memory, by formula: model states, what the backward pass needs, and what the
backward pass itself works in.

What a mixer needs stands in its kind's entry (`model.kinds`). Legend: B sequences of L tokens, D channels, E bytes of
an element of a product (2 in half precision). The residual stream and its gradients are float32.
Checked against the measured peak by `tests/unit/test_training_memory.py`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.warmup import stages
from hyena_dist.costs.engines import Held, Layout, held, parameters, weights
from hyena_dist.model.kinds import Working, kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import FP32, WHOLE, Split
from hyena_dist.ops.backends import MOST_KEPT_CHANNELS
from hyena_dist.ops.chunking import product_elements

MLP_CHUNK = 6
"""Float32 tensors of one chunk that live at a time in the backward pass of an MLP."""
WHOLE_MLP_CHUNK = 2
"""The same in half precision where one kernel makes all of them, as wide as the inner channels."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the tensors of one rank. A CUDA context and the allocator's gaps come on top of them."""

    held: Held
    """Weights, gradients and the optimizer's moments, as the engine holds them."""
    saved: float
    """What the forward pass keeps for the backward pass."""
    blocks: float
    """What the backward pass of the blocks holds beside that where it holds most."""
    exchanged: float
    """Of `blocks`, buffers of what the context ranks send each other."""
    plans: float
    """Of `blocks`, what cuFFT works in."""
    loss: float
    """What head and loss hold beside `saved`, before the backward pass of the blocks."""

    @property
    def working(self) -> float:
        """What the backward pass holds beside `saved` where it holds most."""
        return max(self.blocks, self.loss)

    @property
    def states(self) -> float:
        """What there is of the weights in a pass."""
        return self.held.kept + self.held.waiting

    @property
    def moments(self) -> dict[str, float]:
        """What there is at each time of a step at which it may be the most."""
        before = self.states + self.saved
        return {"loss": before + self.loss, "backward pass": before + self.blocks, "update": self.held.update}

    @property
    def moment(self) -> str:
        """When in a step it is the most."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def total(self) -> float:
        return max(self.moments.values())


class _Block(NamedTuple):
    """Bytes of one block: what the backward pass of each half is given by the forward pass, and holds beside it."""

    mixer: Working
    mlp: Working

    @property
    def saved(self) -> float:
        return self.mixer.saved + self.mlp.saved

    @property
    def working(self) -> float:
        """The most beside `saved`: the MLP comes first, and has freed its own when the mixer comes."""
        return max(self.mlp.working, self.mixer.working + self.mixer.plans - self.mlp.saved)


def training_memory(section: ModelSection, seq_len: int, micro_batch_size: int = 1, *, precision: str = "fp32",
                    activation_checkpointing: str = "none", activation_offload: bool = False, device: str = "cuda",
                    engine: EngineSection | None = None, split: Split = WHOLE, shards: int = 1,
                    micro_batches: int = 2, backend: str = "auto") -> TrainingMemory:
    """Of one rank, on its device.

    Args:
        seq_len: of whole sequences, whatever the split.
        precision, activation_checkpointing, activation_offload: values of the keys of `train`.
        device: "cpu" or "cuda", whose chunks the operators work through.
        engine: None: a loop of plain torch.
        split: how sequence and model are cut.
        shards: ranks over which the engine averages and shards.
        micro_batches: of a step. From 2 on gradients wait while the next is computed.
        backend: a value of `ops.backend`.
    """
    found = _activations(section, seq_len, micro_batch_size, precision, activation_checkpointing, activation_offload,
                         device, split, backend)
    w = FP32 * parameters(section, split.tensor)
    block = FP32 * max(sum(shape.size for shape in block) for block in weights(section, split.tensor).blocks)
    return TrainingMemory(held(w, engine, shards=shards, micro_batches=micro_batches, largest_block=block), *found)


@lru_cache(maxsize=4096)  # a plan asks for them with every engine
def _activations(section: ModelSection, seq_len: int, micro_batch_size: int, precision: str,
                 activation_checkpointing: str, activation_offload: bool, device: str, split: Split,
                 backend: str) -> tuple[float, float, float, float, float]:
    """All of `TrainingMemory` but what the engine holds."""
    E, length = FP32 if precision == "fp32" else 2, -(-seq_len // split.context)
    tokens = micro_batch_size * length
    stream = FP32 * tokens * section.hidden_size
    wide = activation_checkpointing in ("none", "block")
    mixers = {letter: mixer_kind(letter).memory(section, seq_len, micro_batch_size, itemsize=E, wide=wide,
                                                device=torch.device(device), split=split, backend=backend)
              for letter in kinds_of(section)}
    inner = tokens * section.inner_size // split.tensor
    # On a GPU what is as wide as the inner channels is in half precision, as long as it lives.
    one_kernel = (backend == "triton" and device != "cpu" and E < FP32
                  and section.hidden_size <= MOST_KEPT_CHANNELS)
    held_at_a_time: float = MLP_CHUNK * (FP32 if device == "cpu" else E)
    if one_kernel:  # of which three are as wide as the model, and not as the inner channels
        held_at_a_time = (WHOLE_MLP_CHUNK + 3 * section.hidden_size * split.tensor / section.inner_size) * E
    chunk = held_at_a_time * min(inner, product_elements(torch.device(device), inner))
    summed = stream if split.tensor > 1 else 0.0  # the gradient at an MLP is summed over tensor ranks in a copy
    mlp = Working(stream + (wide and not one_kernel) * E * inner, 2 * stream + chunk + summed)
    blocks = [_Block(mixers[letter], mlp) for letter in section.layer_kinds]
    if activation_checkpointing in ("block", "full"):
        kept = stream / split.tensor if split.sequence else stream
        saved: float = len(blocks) * kept  # of one block at a time comes the rest
        deepest = max(blocks, key=lambda block: block.saved + block.working)
        working = deepest.saved - kept + deepest.working
    else:
        deepest = blocks[-1]
        saved, working = sum(block.saved for block in blocks), deepest.working
    # The norm's input and its gradient; and of the loss the logarithms of the probabilities, their gradient and that of
    # the logits, all in float32 at any precision. Of k-mers, with thousands of ids, these are most of a step.
    head = 2 * stream + 3 * FP32 * tokens * section.padded_vocab_size / split.tensor
    if activation_offload:  # what is on its way to the host or back is about that of one block
        saved /= len(blocks)
    return saved, working, deepest.mixer.exchanged, deepest.mixer.plans, head


def run_memory(config: Config, *, world_size: int, device: str = "cuda") -> TrainingMemory:
    """What one rank of a run needs at the stage that needs the most."""
    train, layout = config.train, Layout.of(config, world_size)
    found = [training_memory(config.model, stage.seq_len, stage.micro_batch_size, precision=train.precision,
                             activation_checkpointing=train.activation_checkpointing,
                             activation_offload=train.activation_offload, device=device, engine=config.engine,
                             split=Split.of(config, stage.micro_batch_size), shards=layout.shards,
                             backend=config.ops.backend,
                             micro_batches=stage.global_batch_size // (stage.micro_batch_size * layout.data))
             for stage in stages(config, data_ranks=layout.data)]
    return max(found, key=lambda memory: memory.total)
