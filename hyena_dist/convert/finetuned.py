"""Weights to fine-tune from: of a pretrained model in any format, or of a run that was fine-tuned before."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hyena_dist.checkpoint.directory import Checkpoint, choose_checkpoint, open_checkpoint
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.format import check_model_weights, load_model_weights, weight_shapes
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.directory import read_model
from hyena_dist.convert.section import ConversionError, checked_section
from hyena_dist.convert.weights import check_finite, without_memory
from hyena_dist.model.placement import Placement

FINETUNED = "finetuning"
"""The objective in the metadata of a checkpoint that was fine-tuned."""
HEAD = "answers."
"""What the names of the weights of a fine-tuned head begin with here: a backbone may have a head of its own."""


def read_start(source: str | Path) -> tuple[ModelSection, dict[str, Tensor], Path]:
    """The model in a directory: its section, its weights by name, of a fine-tuned one its head's too, and where it was.

    Raises:
        UserError: as of `read_model`; or it was fine-tuned by adapters, which belong to another backbone.
    """
    source = Path(source)
    checkpoint = None
    if (source / "config.yaml").is_file():
        checkpoint = choose_checkpoint(source, "latest")
        if checkpoint.metadata.get("objective") == FINETUNED:
            checkpoint = choose_checkpoint(source, "best")  # which a fine-tuned run is judged by
    elif (source / MARKER).is_file():
        checkpoint = open_checkpoint(source)
    if checkpoint is not None and checkpoint.metadata.get("objective") == FINETUNED:
        return _finetuned(checkpoint)
    section, model, path = read_model(source)
    return section, {name: parameter.detach() for name, parameter in model.named_parameters()}, path


def _finetuned(checkpoint: Checkpoint) -> tuple[ModelSection, dict[str, Tensor], Path]:
    shapes = {key.removeprefix("model/"): shape for key, shape in weight_shapes(checkpoint).items()}
    if not any(name.startswith("backbone.") for name in shapes) or any(".lora." in name for name in shapes):
        raise ConversionError(f"{checkpoint.path}: was fine-tuned by adapters (finetune.trained=lora), or is no Hyena "
                              "model: give the model that it started from")
    identity = checkpoint.metadata.get("identity", {})
    section = checked_section({key.removeprefix("model."): value for key, value in identity.items()
                               if key.startswith("model.")})
    whole = nn.Module()
    whole.backbone = without_memory(section, shapes, torch.float32)
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    for name, shape in head.items():
        module = whole
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    table = {f"backbone.{name}": entry for name, entry in whole.backbone.placement().items()}
    table |= dict.fromkeys(head, Placement())
    check_model_weights(checkpoint, whole, table)
    with torch.no_grad():
        load_model_weights(checkpoint, whole.to_empty(device="cpu"), table)
    found = {name.removeprefix("backbone.") if name.startswith("backbone.") else HEAD + name: parameter.detach()
             for name, parameter in whole.named_parameters()}
    check_finite(found)
    return section, found, checkpoint.path
