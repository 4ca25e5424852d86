"""One HyenaDNA model in three shapes, of the same weights: ours, the frozen baseline's, and that one in float64."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import from_published, to_published
from hyena_dist.model.config import COMPUTE_DTYPES
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.precision import autocast_kind


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    length: int
    width: int = 64
    batch: int = 1
    layers: int = 2

    def section(self, layer_pattern: str = "") -> ModelSection:
        """The `model` section: as published, without dropout; attention in heads of 64 channels, where the width has
        them, or the next that rotary positions can use."""
        heads = next(heads for heads in range(max(1, self.width // 64), 0, -1)
                     if heads == 1 or self.width % (2 * heads) == 0)
        return ModelSection(num_layers=self.layers, hidden_size=self.width, max_seq_len=self.length, embed_dropout=0.0,
                            layer_pattern=layer_pattern, num_attention_heads=heads)


@dataclass(frozen=True)
class Models:
    """The same weights three times; `exact` stays on float64."""

    ours: HyenaModel
    baseline: BaselineHyenaDNA
    exact: BaselineHyenaDNA

    @classmethod
    def build(cls, size: Size, device: torch.device) -> "Models":
        section = size.section()
        layer = {"l_max": size.length, "emb_dim": section.filter_emb_dim, "filter_order": section.filter_order,
                 "short_filter_order": section.short_conv_kernel, "order": section.hyena_order,
                 "w": section.filter_sine_freq}
        config: dict[str, Any] = {"d_model": size.width, "n_layer": size.layers, "d_inner": section.inner_size,
                                  "vocab_size": section.vocab_size, "embed_dropout": 0.0, "resid_dropout": 0.0,
                                  "pad_vocab_size_multiple": 8, "layer": layer}
        ours = from_published(config, None).train()
        baseline = BaselineHyenaDNA(config)
        baseline.load_state_dict(to_published(ours)[1])
        return cls(ours.to(device), baseline.to(device), copy.deepcopy(baseline).double().to(device))


def published(model: HyenaModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that belong to our parameters, such as gradients, by the published names and in their shapes."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            parameter.copy_(values[name]) if name in values else parameter.zero_()
    return to_published(holder)[1]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """What train.precision means in plain python."""
    dtype = COMPUTE_DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(autocast_kind(device), dtype=dtype)
