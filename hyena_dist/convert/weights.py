"""The tensors of a stranger's file, before they become weights."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.section import ConversionError
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel

DERIVED = (".pos_emb.z", ".pos_emb.t", ".modulation.deltas")
"""Ends of the keys of what a published file stores and this model computes: positions and decay rates."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def without_memory(section: ModelSection, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> HyenaModel:
    """The model of a section on the meta device, to compare its shapes with those in a file: what a configuration asks
    for is not built before the file is known to have it.

    Args:
        shapes: of the weights in the file, by name.

    Raises:
        ConversionError: a size that the file cannot have, by which alone a model would take for ever.
    """
    layers = {match[1] for key in shapes if (match := re.search(r"layers\.(\d+)\.", key))}
    if len(layers) != section.num_layers:
        raise ConversionError(f"the config asks for {section.num_layers} layers, and the file has {len(layers)}: use "
                              "the configuration that belongs to these weights")
    numbers = sum(shape.numel() for shape in shapes.values())
    for name, most in (("filter_num_inner_mlps", len(shapes)), ("hyena_order", numbers), ("hidden_size", numbers),
                       ("filter_order", numbers), ("filter_emb_dim", numbers), ("short_conv_kernel", numbers),
                       ("vocab_size", numbers), ("inner_size", numbers)):
        if getattr(section, name) > most:
            raise ConversionError(f"the config asks for a {name} of {getattr(section, name)}, more than the file has "
                                  "weights for: use the configuration that belongs to these weights")
    with torch.device("meta"):
        return HyenaModel(hyena_config(section, params_dtype=dtype))


def check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no tensor of a weight, by what can be seen without looking at a number; before anything else,
    because most operators fail on such tensors, or make all the numbers that they claim to have.

    Raises:
        ConversionError: naming a tensor of another type or form, or with fewer numbers in the file than its shape.
    """
    for key, value in tensors.items():
        form = ("without numbers" if value.is_meta else "nested" if value.is_nested else
                "sparse" if value.layout is not torch.strided else "")
        if value.dtype not in DTYPES or form:
            kind = str(value.dtype).removeprefix("torch.")
            raise ConversionError(f"{key} is a tensor of {kind}{form and ', '}{form}: HyenaDNA's weights are dense "
                                  "floating-point numbers, and quantised ones are not supported: convert them back "
                                  "first")
        stored = value.untyped_storage().nbytes() // value.itemsize
        if value.numel() > stored:
            raise ConversionError(f"{key} has shape {list(value.shape)} and {stored} numbers in the file: write it "
                                  "again with its numbers (contiguous)")


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises ConversionError: naming a weight with a number that is none."""
    for key, value in weights.items():
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ConversionError(f"{key} holds NaN or infinity ({count} of {value.numel()} numbers): the file is "
                                  "damaged, or its training failed: choose another one")


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of narrower types widened, which is exact; derived tensors keep theirs, by which they are judged.

    Raises:
        ConversionError: a tensor in float64, or what `check_kinds` refuses.
    """
    check_kinds(tensors)
    double = [key for key, value in tensors.items() if value.dtype == torch.float64]
    if double:
        raise ConversionError(f"{double[0]} is in float64, which float32 cannot hold exactly: convert it with "
                              "hyena_dist.convert.from_published, or round it first")
    narrow = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in narrow and not key.endswith(DERIVED) else value
            for key, value in tensors.items()}
