"""What a fine-tuned run holds: the backbone as the language model that it was, with adapters merged into its weights,
and the head of the task."""

import logging

import torch
from torch import Tensor, nn

from hyena_dist.checkpoint.directory import Checkpoint
from hyena_dist.checkpoint.format import load_model_weights, weight_shapes
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.sections.finetune import FinetuneSection, words_of
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.section import ConversionError
from hyena_dist.convert.weights import check_finite, without_memory
from hyena_dist.model.lora import add_adapters, merge_adapters
from hyena_dist.model.model import HyenaModel

_BACKBONE, _PROMPT, _HEAD = "model/backbone.", "model/backbone.embedding.prompt.", "model/head."

logger = logging.getLogger(__name__)


class _Backbone(nn.Module):
    """Gives the weights of a backbone the names that they have in a fine-tuned run."""

    def __init__(self, backbone: HyenaModel) -> None:
        super().__init__()
        self.backbone = backbone


def read_finetuned(checkpoint: Checkpoint, section: ModelSection) -> tuple[HyenaModel, dict[str, Tensor]]:
    """The backbone in a checkpoint of a fine-tuned run, on the CPU, in float32 and eval mode, and the weights of the
    head by their names. A soft prompt is left out, which is said.

    Raises:
        UserError: there is no backbone in it, or it is damaged.
    """
    shapes = weight_shapes(checkpoint)
    of_backbone = {key: shape for key, shape in shapes.items() if key.startswith(_BACKBONE)}
    if not of_backbone:
        raise ConversionError(f"{checkpoint.path} is of a fine-tuning, and there is no HyenaDNA model in it: give a "
                              "run that has one")
    adapters = {key for key in of_backbone if ".lora." in key}
    prompt = {key for key in of_backbone if key.startswith(_PROMPT)}
    plain = {key: shape for key, shape in of_backbone.items() if key not in adapters | prompt}
    model = without_memory(section, plain, torch.float32).to_empty(device="cpu")
    if adapters:
        keys = ("lora_rank", "lora_alpha", "lora_targets")
        tune = FinetuneSection(**{key: checkpoint.metadata["identity"][f"finetune.{key}"] for key in keys})
        add_adapters(model, rank=tune.lora_rank, alpha=tune.lora_alpha, targets=words_of(tune.lora_targets or ""),
                     seed=0)
    table = {f"backbone.{name}": entry for name, entry in model.placement().items()}
    load_model_weights(checkpoint, _Backbone(model), table, ignore=(_HEAD, _PROMPT))
    if prompt:
        logger.warning("%s: its soft prompt (finetune.prompt_tokens) is left out: the model is the one that it was "
                       "learnt for", checkpoint.path)
    if adapters:
        merge_adapters(model)
        logger.info("%s: the adapters are merged into the weights", checkpoint.path)
    head = TensorReader(checkpoint.path).read({key: shape for key, shape in shapes.items() if key.startswith(_HEAD)})
    named = {key.removeprefix("model/"): value for key, value in head.items()}
    check_finite({name: parameter.detach() for name, parameter in model.named_parameters()} | named)
    return model.requires_grad_(True).eval(), named


def read_backbone(checkpoint: Checkpoint, section: ModelSection) -> HyenaModel:
    """The same without the head, which files of language models have no place for; that is said."""
    model, head = read_finetuned(checkpoint, section)
    if head:
        logger.warning("%s: %s is of its task, and is left out: what is read is the language model below it",
                       checkpoint.path, ", ".join(sorted(head)))
    return model
