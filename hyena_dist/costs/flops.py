"""What a forward and backward pass costs, by formula: floating-point operations and bytes of every part of the model.

A matrix product of [m, k] by [k, n] is 2 m k n operations, as torch's FlopCounterMode counts; a complex FFT of N points
is 5 N log2 N, as FFTW counts. Norms, gates, activations and the optimizer are some operations per element and are left
out. Legend: B sequences of L tokens, D channels, N order, F width and E features of the filter's trunk, V vocabulary.
"""

import math
import re
from dataclasses import dataclass

from scipy.fft import next_fast_len

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.ops.implicit_filter import keeps_trunk

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


@dataclass(frozen=True)
class Part:
    """One part of the model, all of its layers together, in a forward pass of a micro-batch."""

    flops: float
    inputs: float
    """Elements that it must read at least: activations and weights."""
    outputs: float
    """Elements that it must write at least."""

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.inputs + other.inputs, self.outputs + other.outputs)


NOTHING = Part(0.0, 0.0, 0.0)


def layer_kinds(section: ModelSection) -> str:
    """The letter of every layer: H Hyena, A attention."""
    return ((section.layer_pattern or "H") * section.num_layers)[: section.num_layers]


def parts(section: ModelSection, seq_len: int, micro_batch_size: int = 1) -> dict[str, Part]:
    """Every part by name. The filter is generated, and transformed, once for all sequences of a micro-batch."""
    D, V, tokens = section.hidden_size, section.padded_vocab_size, micro_batch_size * seq_len
    layers = section.num_layers
    attention_layers = layer_kinds(section).count("A")
    hyena, attention = _hyena(section, seq_len, micro_batch_size), _attention(section, seq_len, micro_batch_size)
    found = {name: _times(part, layers - attention_layers) for name, part in hyena.items()}
    for name, part in attention.items():
        found[name] = found.get(name, NOTHING) + _times(part, attention_layers)
    found["mlp"] = _times(_linear(tokens, D, section.inner_size) + _linear(tokens, section.inner_size, D), layers)
    found["embedding"] = Part(0.0, tokens * (D + 1), tokens * D)
    found["head"] = _linear(tokens, D, V, bias=False)
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
    """Operations that the backward pass repeats at a value of train.activation_checkpointing. The spectra, which are
    repeated at every value, are counted in TRAINING_PASSES."""
    found, D, tokens = flops(section, seq_len, micro_batch_size), section.hidden_size, micro_batch_size * seq_len
    hyena_layers, width = layer_kinds(section).count("H"), section.filter_order
    blocks = sum(found.values()) - found["embedding"] - found["head"]
    trunk = hyena_layers * 2.0 * seq_len * width * (section.filter_emb_dim + section.filter_num_inner_mlps * width)
    at_least = 0.0 if keeps_trunk(seq_len) else trunk
    inner = (hyena_layers * _linear(tokens, D, (section.hyena_order + 1) * D).flops
             + section.num_layers * _linear(tokens, D, section.inner_size).flops + trunk)
    return {"none": at_least, "selective": inner, "block": blocks + at_least,
            "full": blocks + inner}[activation_checkpointing]


def forward_bytes(part: Part, itemsize: int) -> float:
    """What a part must move through memory in a forward pass, at least."""
    return itemsize * (part.inputs + part.outputs)


def training_bytes(part: Part, itemsize: int) -> float:
    """The same of forward and backward: that reads the inputs and the outputs' gradients and writes the inputs'."""
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


def _hyena(section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
    """The parts of one Hyena mixer."""
    D, order, taps = section.hidden_size, section.hyena_order, section.short_conv_kernel
    filters, width, tokens = order - 1, section.filter_order, batch * seq_len
    sizes = [section.filter_emb_dim, *[width] * (section.filter_num_inner_mlps + 1), filters * D]
    weights = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    # Real channels as complex numbers of N points: u and y of every sequence, h once.
    transforms = filters * D * (2 * batch + 1)
    channels = (order + 1) * D
    return {
        "projections": _linear(tokens, D, channels) + _linear(tokens, D, D),
        "short_conv": Part(2.0 * taps * tokens * channels, channels * (tokens + taps + 1), tokens * channels),
        "filter": Part(2.0 * seq_len * weights, weights, filters * D * seq_len),
        "long_conv": Part(transforms * fft_flops(next_fast_len(seq_len)),
                          filters * D * (2 * tokens + seq_len + 1), filters * D * tokens),
    }


def _attention(section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
    """The parts of one attention mixer. Two products over the lower triangle: causal kernels skip the upper one."""
    D, tokens = section.hidden_size, batch * seq_len
    return {"projections": _linear(tokens, D, 3 * D) + _linear(tokens, D, D),
            "attention": Part(2 * 2.0 * batch * D * seq_len * (seq_len + 1) / 2, 3 * tokens * D, tokens * D)}


def fft_flops(size: int) -> float:
    """Operations of a complex FFT. The right-angle convolution has one of N = next_fast_len(L) points for each real
    channel; a real FFT of 2L points, as in the padded convolution, is half of a complex one of 2L: about as many."""
    return 5.0 * size * math.log2(size)


def _linear(tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Part:
    return Part(2.0 * tokens * inputs * outputs, tokens * inputs + inputs * outputs + bias * outputs, tokens * outputs)


def _times(part: Part, count: int) -> Part:
    return Part(count * part.flops, count * part.inputs, count * part.outputs)
