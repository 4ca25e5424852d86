"""HyenaMixer inside Megatron's own GPTModel: the configuration and the layer spec that it takes.

Megatron initialises the weights of its own modules (embedding, MLP, norms). Those of the mixers are given by their
names, as in HyenaModel: the same seed makes the same mixers at every number of tensor ranks.
"""

import copy
from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.config import HyenaConfig, hyena_config
from hyena_dist.model.initial import layer_name
from hyena_dist.model.kinds import lacking
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.model.placement import Placement
from hyena_dist.model.table import part_placements


def gelu_tanh(x: Tensor) -> Tensor:
    """The published activation: GELU by tanh."""
    return F.gelu(x, approximate="tanh")


def megatron_config(model: ModelSection, *, parallel: ParallelSection | None = None) -> HyenaConfig:
    """The configuration of a GPTModel of Hyena layers; without `parallel`, of one rank.

    Other fields of TransformerConfig may be set on the result.

    Raises:
        ConfigError: the section asks for what a GPTModel of these layers does not have.
    """
    if model.embed_dropout != model.resid_dropout:
        raise ConfigError(f"model.embed_dropout ({model.embed_dropout}) and model.resid_dropout "
                          f"({model.resid_dropout}) differ, and Megatron has one probability for both: set them equal")
    if others := lacking(model.layer_kinds, "megatron"):
        raise ConfigError(f"model.layer_pattern={model.layer_pattern!r} has {' and '.join(others)} layers, and "
                          'hyena_layer_spec makes Hyena layers only: set it to ""')
    config = hyena_config(model, parallel=parallel)
    config.perform_initialization = True  # of Megatron's own modules
    config.hidden_dropout = model.resid_dropout
    config.activation_func = gelu_tanh
    return config


def hyena_layer_spec(*, seed: int) -> ModuleSpec:
    """Megatron's local layer (no Transformer Engine) with a HyenaMixer as its `self_attention`, for GPTModel.

    The GPTModel needs the configuration of `megatron_config`, `position_embedding_type="none"`, and None for its
    attention mask; its `vocab_size` is `config.padded_vocab_size`.

    Args:
        seed: of the mixers' initial values; torch's own seed, set alike on all ranks, gives those of the rest.
    """
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention = ModuleSpec(module=SelfAttentionMixer, params={"seed": seed})
    return spec


class SelfAttentionMixer(HyenaMixer):
    """A HyenaMixer that owes nothing to the model around it: it comes with its initial values, and with the attributes
    by which Megatron's optimizer, gradient norm and gradient sums know a weight that is split.

    Raises:
        ConfigError: the configuration would leave weights uninitialised, or lower the filter's precision.
    """

    def __init__(self, config: HyenaConfig, layer_number: int, *, seed: int, pg_collection: ProcessGroupCollection,
                 cp_comm_type: str | None = None) -> None:  # noqa: ARG002 - attention's; ours is context_method
        if not config.perform_initialization:
            raise ConfigError("perform_initialization is off: the model around the mixers would start from "
                              "uninitialised memory: use megatron_config")
        if config.params_dtype.itemsize < 4 or config.bf16 or config.fp16:
            raise ConfigError("the implicit filter needs float32 weights: leave params_dtype, bf16 and fp16 as "
                              "megatron_config sets them, and enter torch.autocast around the model")
        config = copy.copy(config)
        config.perform_initialization = False  # Megatron's linears would draw from torch's generator
        super().__init__(config, layer_number, pg_collection=pg_collection, seed=seed)
        table = mixer_table(self)
        for name, parameter in self.named_parameters():
            split = table[name].tp_dim
            parameter.tensor_model_parallel = split is not None  # type: ignore[attr-defined]
            parameter.partition_dim = -1 if split is None else split  # type: ignore[attr-defined]
            parameter.partition_stride = len(table[name].parts) or 1  # type: ignore[attr-defined]
            # Megatron would sum these gradients over the tensor ranks; they are summed already, at the weight's use.
            parameter.sequence_parallel = False  # type: ignore[attr-defined]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Megatron's distributed checkpoint asks for this. What it does with a module that has no such method is to
        save the first tensor rank's share as the whole.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Megatron's distributed checkpoint of Hyena mixers is not supported yet: save state_dict() "
                          "of each tensor rank")


def mixer_table(mixer: HyenaMixer) -> dict[str, Placement]:
    """The placement of a mixer's own parameters, by their names in it."""
    name = f"{layer_name(mixer.layer_number)}.mixer"
    return {own.removeprefix(f"{name}."): placement
            for own, placement in part_placements(mixer, name, mixer.config).items()}
