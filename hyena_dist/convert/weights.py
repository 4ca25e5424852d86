"""The tensors of a stranger's file, before they become weights."""

import logging
import re
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.section import ConversionError
from hyena_dist.model.config import hyena_config
from hyena_dist.model.heads import HEADS
from hyena_dist.model.kinds import lacking
from hyena_dist.model.model import HyenaModel

logger = logging.getLogger(__name__)

DERIVED = (".pos_emb.z", ".pos_emb.t", ".modulation.deltas")
"""Ends of the keys of what a published file stores and this model computes: positions and decay rates."""
HEAD, TABLE = "lm_head.weight", "backbone.embeddings.word_embeddings.weight"
"""Published keys of the head and of the embedding, which are one weight where they are tied."""
_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and torch's checkpoint wrapper put into keys, wherever a module was wrapped."""
_PREFIXES = ("module.", "model.", "hyena.")
"""What stands before keys: of DistributedDataParallel and DeepSpeed, of Lightning, of Hugging Face's port."""
_OTHER_HEADS = re.compile(r"(score|classifier|(head|decoder(\.\d+)?)\.output_transform)\.(weight|bias)")
"""Heads that predict a class or a number of a whole sequence: of Hugging Face's port, and of the published code."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the keys of the model itself, without what wrappers around it and around its modules have added, and
    without torchmetrics' counters and the heads of other tasks, which are no part of it; of a head it says so.

    Raises:
        ConversionError: two tensors that would have one key differ, or what `check_kinds` refuses.
    """
    kept = {key: value for key, value in tensors.items() if "torchmetrics" not in key}
    check_kinds(kept)
    found: dict[str, Tensor] = {}
    for key, value in kept.items():
        bare = key
        for wrapped in _WRAPPED:
            bare = bare.replace(wrapped, "")
        while (prefix := next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None)) is not None:
            bare = bare.removeprefix(prefix)
        if _OTHER_HEADS.fullmatch(bare):
            logger.warning("%s of shape %s is left out: it is a head of another task, and this model predicts the next "
                           "token", key, list(value.shape))
        elif bare in found and not same(value, found[bare]):
            raise ConversionError(f"two tensors of the file that are one weight of HyenaDNA differ: {bare}")
        else:
            found[bare] = value
    return found


def same(first: Tensor, second: Tensor) -> bool:
    """Equal in shape and in every number, whatever their types."""
    return first.shape == second.shape and torch.equal(first.double(), second.double())


def without_memory(section: ModelSection, shapes: Mapping[str, torch.Size], dtype: torch.dtype,
                   names: Mapping[str, str] = MappingProxyType({})) -> HyenaModel:
    """The model of a section on the meta device, to compare its shapes with those in a file: what a configuration asks
    for is not built before the file is known to have it.

    Args:
        shapes: of the weights in the file, by name.
        names: what the file's configuration calls the keys of the section, where it has other names.

    Raises:
        ConversionError: a size that the file cannot have, by which alone a model would take for ever.
    """
    layers = {match[1] for key in shapes if (match := re.search(r"layers\.(\d+)\.", key))}
    if len(layers) != section.num_layers:
        raise ConversionError(f"{names.get('num_layers', 'num_layers')} is {section.num_layers}, and the file has the "
                              f"weights of {len(layers)} layers: use the configuration that belongs to these weights")
    numbers = sum(shape.numel() for shape in shapes.values())
    for name, most in (("filter_num_inner_mlps", len(shapes)), ("hyena_order", numbers), ("hidden_size", numbers),
                       ("filter_order", numbers), ("filter_emb_dim", numbers), ("short_conv_kernel", numbers),
                       ("vocab_size", numbers), ("ffn_hidden_size", numbers)):
        value = getattr(section, name) or 0  # a width of null follows from another one
        if value > most:
            raise ConversionError(f"{names.get(name, name)} is {value}, more than the file has weights for: use the "
                                  "configuration that belongs to these weights")
    with torch.device("meta"):
        return HyenaModel(hyena_config(section, params_dtype=dtype))


def refuse_head(model: HyenaModel) -> None:
    """Refuse a model whose head is not a language model's, which is not described by its `model` section.

    Raises:
        ConversionError: naming what can be done.
    """
    if model.head_kind not in HEADS.values():
        raise ConversionError("the model's head is of another task, and these files hold language models: keep it as a "
                              "checkpoint of its run")


def refuse_kmers(model: HyenaModel) -> None:
    """Refuse a model of k-mers: files of others have no place to say which tokens its ids are.

    Raises:
        ConversionError: naming what can be done.
    """
    if model.config.kmer != 1:
        raise ConversionError(f"the tokens of this model are {model.config.kmer}-mers (model.kmer), and the published "
                              "code and Hugging Face's read single bases: keep this model as safetensors or a "
                              "checkpoint")


def refuse_kinds(model: HyenaModel, format: str) -> None:
    """Refuse a model with a mixer that a layout of others does not have.

    Args:
        format: published or huggingface.

    Raises:
        ConversionError: naming the kinds of mixers.
    """
    if others := lacking(model.config.layer_kinds, format):
        whose = {"published": "the published code", "huggingface": "Hugging Face's code"}[format]
        raise ConversionError(f"{whose} has no {' and no '.join(others)} layers (model.layer_pattern): keep this model "
                              "as safetensors or a checkpoint")


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
