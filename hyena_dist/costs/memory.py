"""What a training step keeps in a device's memory, by formula: model states, what the backward pass needs, and what the
backward pass itself works in.

What a mixer needs stands in its kind's entry (`model.kinds`). Legend: B sequences of L tokens, D channels, E bytes of
an element of a product (2 in half precision). The residual stream and its gradients are float32.
Checked against the measured peak by `tests/unit/test_training_memory.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.warmup import stages
from hyena_dist.model.kinds import Working, kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import FP32
from hyena_dist.ops.chunking import product_elements

STATE_BYTES = 16
"""Of a parameter: weight, gradient and AdamW's two moments in float32, which is what every train.precision keeps."""

ENGINE_BYTES = {"fsdp": 9.0, "zero0": 4.0, "zero1": 16.5, "zero2": 20.0, "zero3": 16.0}
"""Of a parameter, on one rank, what an engine holds beside that where it holds most: of DeepSpeed its flat copies of
weights and gradients and a bucket of all gradients, of FSDP2 gathered weights, of each the squares of a norm."""

MLP_CHUNK = 6
"""Float32 tensors of one chunk that live at a time in the backward pass of an MLP."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device that holds the whole model. A CUDA context and the allocator's gaps come on top of them."""

    states: float
    """Parameters, their gradients and the optimizer's moments, and what the engine holds of each."""
    saved: float
    """What the forward pass keeps for the backward pass."""
    working: float
    """What the backward pass holds beside that where it holds most."""

    @property
    def total(self) -> float:
        return self.states + self.saved + self.working


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
        return max(self.mlp.working, self.mixer.working - self.mlp.saved)


def parameters(section: ModelSection) -> int:
    """Number of the model's weights; embedding and head share theirs where they are tied."""
    D, inner = section.hidden_size, section.inner_size
    around = inner * (D + 1) + D * (inner + 1) + 4 * D  # of a mixer: the MLP and two norms
    mixers = sum(layers * mixer_kind(letter).parameters(section) for letter, layers in kinds_of(section).items())
    return (mixers + section.num_layers * around
            + 2 * D + (1 if section.tie_embeddings else 2) * section.padded_vocab_size * D)


def training_memory(section: ModelSection, seq_len: int, micro_batch_size: int = 1, *, precision: str = "fp32",
                    activation_checkpointing: str = "none", device: str = "cuda",
                    engine: EngineSection | None = None) -> TrainingMemory:
    """Of a micro-batch on one rank, at a value of train.precision and of train.activation_checkpointing, with the
    chunks of that kind of device ("cpu" or "cuda"), in an engine without offloading; None: in a loop of plain torch."""
    tokens, E = micro_batch_size * seq_len, FP32 if precision == "fp32" else 2
    stream = FP32 * tokens * section.hidden_size
    wide = activation_checkpointing in ("none", "block")
    mixers = {letter: mixer_kind(letter).memory(section, seq_len, micro_batch_size, itemsize=E, wide=wide,
                                                device=torch.device(device)) for letter in kinds_of(section)}
    inner = tokens * section.inner_size
    # On a GPU what is as wide as the inner channels is in half precision, as long as it lives.
    chunk = MLP_CHUNK * (FP32 if device == "cpu" else E) * min(inner, product_elements(torch.device(device)))
    mlp = Working(stream + wide * E * inner, 2 * stream + chunk)
    blocks = [_Block(mixers[letter], mlp) for letter in section.layer_kinds]
    if activation_checkpointing in ("block", "full"):
        saved: float = len(blocks) * stream  # of one block at a time comes the rest
        working = max(block.saved - stream + block.working for block in blocks)
    else:
        saved, working = sum(block.saved for block in blocks), blocks[-1].working
    # The norm's input and its gradient; and of the loss the logarithms of the probabilities, their gradient and that of
    # the logits, all in float32 at any precision. Of k-mers, with thousands of ids, these are most of a step.
    head = 2 * stream + 3 * FP32 * tokens * section.padded_vocab_size
    held = 0.0 if engine is None else ENGINE_BYTES["fsdp" if engine.name == "fsdp" else f"zero{engine.zero_stage}"]
    return TrainingMemory((STATE_BYTES + held) * parameters(section), saved, max(working, head))


def run_memory(config: Config, *, device: str = "cuda", data_ranks: int = 1) -> TrainingMemory:
    """About what one rank of a run needs at the stage that needs the most. What tokens and channels take is split over
    context and tensor ranks; states are counted whole, though an engine may shard or move them."""
    train, split = config.train, config.parallel.tensor * config.parallel.context
    found = [training_memory(config.model, stage.seq_len, stage.micro_batch_size, precision=train.precision,
                             activation_checkpointing=train.activation_checkpointing, device=device,
                             engine=config.engine) for stage in stages(config, data_ranks=data_ranks)]
    most = max(found, key=lambda memory: memory.total)
    return TrainingMemory(most.states, most.saved / split, most.working / split)


def longest_sequence(section: ModelSection, memory_bytes: float, *, precision: str = "fp32",
                     activation_checkpointing: str = "none") -> int:
    """The most tokens of one sequence, a multiple of 1024, with which a CUDA device of this memory can train; 0: not
    even 1024."""
    low, high = 0, 2**17  # in 1024 tokens
    while high - low > 1:
        middle = (low + high) // 2
        needed = training_memory(section, 1024 * middle, precision=precision,
                                 activation_checkpointing=activation_checkpointing)
        low, high = (middle, high) if needed.total <= memory_bytes else (low, middle)
    return 1024 * low
