"""What a forward and backward pass costs, by formula: floating-point operations and bytes of every part of the model.

What a mixer costs stands in its kind's entry (`model.kinds`), what operations are in `model.kinds.formulas`. Norms,
gates, activations and the optimizer are some operations per element and are left out. Legend: D channels, V vocabulary.
"""

import re

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.kinds import kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import NOTHING, Part, product

TRAINING_PASSES = 3
"""Forward, and a backward pass of twice its work: gradients of the inputs and of the weights. The long convolution has
the same factor: its backward pass transforms once more what the forward pass did, and as much for the gradients."""

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200 NVL": {"bf16": 835.5, "fp32": 60.0},
    "H200": {"bf16": 989.5, "fp32": 67.0},
    "H100 NVL": {"bf16": 835.5, "fp32": 60.0},
    "H100 PCIe": {"bf16": 756.5, "fp32": 51.0},
    "H100": {"bf16": 989.5, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
}
"""By the part of the device's name that says which it is, the more special before the more general. NVIDIA's data
sheets of the H200, H100 and A100 Tensor Core GPUs: "BFLOAT16 Tensor Core", of which those of the H100 and H200 are with
sparsity and are halved here, and "FP32" without tensor cores, as torch multiplies float32 unless TF32 is allowed."""


def parts(section: ModelSection, seq_len: int, micro_batch_size: int = 1) -> dict[str, Part]:
    """Every part by name, all of its layers together, in a forward pass of a micro-batch."""
    D, tokens = section.hidden_size, micro_batch_size * seq_len
    found: dict[str, Part] = {}
    for letter, layers in kinds_of(section).items():
        for name, part in mixer_kind(letter).parts(section, seq_len, micro_batch_size).items():
            found[name] = found.get(name, NOTHING) + part * layers
    mlp = product(tokens, D, section.inner_size) + product(tokens, section.inner_size, D)
    found["mlp"] = mlp * section.num_layers
    found["embedding"] = Part(0.0, tokens * (D + 1), tokens * D)
    found["head"] = product(tokens, D, section.padded_vocab_size, bias=False)
    return found


def flops(section: ModelSection, seq_len: int, micro_batch_size: int = 1) -> dict[str, float]:
    """Operations of every part in the forward pass of a micro-batch, over all layers."""
    return {name: part.flops for name, part in parts(section, seq_len, micro_batch_size).items()}


def training_flops(section: ModelSection, seq_len: int, micro_batch_size: int = 1) -> float:
    """Operations of the model in the forward and backward pass of a micro-batch. What is recomputed is not in it: it is
    work of the machine's, not the model's."""
    return TRAINING_PASSES * sum(flops(section, seq_len, micro_batch_size).values())


def recomputed_flops(section: ModelSection, seq_len: int, micro_batch_size: int,
                     activation_checkpointing: str) -> float:
    """Operations that the backward pass repeats at a value of train.activation_checkpointing."""
    found, tokens = flops(section, seq_len, micro_batch_size), micro_batch_size * seq_len
    blocks = sum(found.values()) - found["embedding"] - found["head"]
    always, inner = 0.0, section.num_layers * product(tokens, section.hidden_size, section.inner_size).flops
    for letter, layers in kinds_of(section).items():
        repeated = mixer_kind(letter).repeated(section, seq_len, micro_batch_size)
        always, inner = always + layers * repeated.always, inner + layers * repeated.inner
    return {"none": always, "selective": inner, "block": blocks + always,
            "full": blocks + inner}[activation_checkpointing]


def training_bytes(part: Part, itemsize: int) -> float:
    """What a part must move through memory in forward and backward, at least: forward reads the inputs and writes the
    outputs, backward reads the inputs and the outputs' gradients and writes the inputs'."""
    return itemsize * (3 * part.inputs + 2 * part.outputs)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations per second of dense matrix products that the maker states, by `torch.cuda.get_device_name()` and
    train.precision (fp16 is as fast as bf16); None for a device that is not in the table, such as a CPU or a slice of
    a GPU."""
    if "MIG" in device_name:
        return None
    for part, peaks in PEAK_TFLOPS.items():
        if re.search(rf"\b{part}\b", device_name):
            return 1e12 * peaks["bf16" if precision == "fp16" else precision]
    return None


def mfu(section: ModelSection, seq_len: int, *, tokens_per_second: float, peak: float,
        micro_batch_size: int = 1) -> float:
    """Model FLOPs utilisation: the operations that training must do over those that the devices could have done.

    Args:
        tokens_per_second: over all devices.
        peak: operations per second of all devices together.
    """
    per_token = training_flops(section, seq_len, micro_batch_size) / (micro_batch_size * seq_len)
    return tokens_per_second * per_token / peak
