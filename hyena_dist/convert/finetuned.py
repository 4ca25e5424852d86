"""The backbone of a fine-tuned run, as the language model that it was: adapters are merged into its weights, and the
head
of the task, which files of language models have no place for, is left out."""

import logging
from typing import Any

import torch
from torch import nn

from hyena_dist.checkpoint.directory import Checkpoint
from hyena_dist.checkpoint.format import load_model_weights, weight_shapes
from hyena_dist.config.sections.finetune import FinetuneSection, words_of
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.section import ConversionError
from hyena_dist.convert.weights import check_finite, without_memory
from hyena_dist.model.lora import add_adapters, merge_adapters
from hyena_dist.model.model import HyenaModel

_PREFIX = "model/backbone."

logger = logging.getLogger(__name__)


class _Backbone(nn.Module):
    """Gives the weights of a backbone the names that they have in a fine-tuned run."""

    def __init__(self, backbone: HyenaModel) -> None:
        super().__init__()
        self.backbone = backbone


def read_backbone(checkpoint: Checkpoint, section: ModelSection) -> HyenaModel:
    """The backbone in a checkpoint of a fine-tuned run, on the CPU, in float32 and eval mode.

    Raises:
        UserError: there is none in it, or it is damaged.
    """
    shapes = weight_shapes(checkpoint)
    of_backbone = {key: shape for key, shape in shapes.items() if key.startswith(_PREFIX)}
    if not of_backbone:
        raise ConversionError(f"{checkpoint.path} is of a fine-tuning, and there is no HyenaDNA model in it: give a "
                              "run that has one")
    plain = {key: shape for key, shape in of_backbone.items() if ".lora." not in key and ".prompt." not in key}
    model = without_memory(section, plain, torch.float32).to_empty(device="cpu")
    identity = checkpoint.metadata["identity"]
    if len(plain) < len(of_backbone) and any(".lora." in key for key in of_backbone):
        tune = FinetuneSection(**_adapters(identity))
        add_adapters(model, rank=tune.lora_rank, alpha=tune.lora_alpha,
                     targets=words_of(tune.lora_targets or ""), seed=0)
    holder = _Backbone(model)
    table = {f"backbone.{name}": entry for name, entry in model.placement().items()}
    left_out = sorted(shapes.keys() - of_backbone.keys()) + [key for key in of_backbone if ".prompt." in key]
    load_model_weights(checkpoint, holder, table, ignore=tuple(left_out))
    check_finite({name: parameter.detach() for name, parameter in holder.named_parameters()})
    if model.adapters:
        merge_adapters(model)
        logger.info("%s: the adapters are merged into the weights", checkpoint.path)
    if left_out:
        logger.warning("%s: %s is of its task, and is left out: what is read is the language model below it",
                       checkpoint.path, ", ".join(key.removeprefix("model/") for key in left_out))
    return model.requires_grad_(True).eval()


def _adapters(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: identity[f"finetune.{key}"] for key in ("lora_rank", "lora_alpha", "lora_targets")}
