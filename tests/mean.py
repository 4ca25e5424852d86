"""A third kind of mixer, of the tests alone: a gated mean of all tokens so far. It is registered by a line,
`MIXERS["X"] = "tests.mean"`, and no file of the package knows of it."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.config.advice import Misfit, Problem
from hyena_dist.config.checks import Use
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.initial import initialize_part, layer_name
from hyena_dist.model.kinds import MixerKind, MixerModule, Working
from hyena_dist.model.kinds.formulas import FP32, WHOLE, Part, Shape, Split, product, product_bytes, ring
from hyena_dist.model.layers import ColumnLinear, Norm, RowLinear, refuse_arguments
from hyena_dist.model.placement import Placement, Uniform, Weights, column, row
from hyena_dist.parallel.collectives import Exchange
from hyena_dist.parallel.groups import context_axis, tensor_axis


class MeanMixer(nn.Module):
    """gate | value = in_proj(x);   out = out_proj(sigmoid(gate + shift) * mean of value up to each token)."""

    def __init__(self, config: HyenaConfig, layer_number: int, *,
                 pg_collection: ProcessGroupCollection | None = None, seed: int | None = 0) -> None:
        super().__init__()
        width, tensor = config.hidden_size, tensor_axis(pg_collection)
        self.context = context_axis(pg_collection)
        self.in_proj = ColumnLinear(width, 2 * width, config=config, pg_collection=pg_collection)
        self.shift = nn.Parameter(torch.empty(width // tensor.size, dtype=config.params_dtype))
        self.out_proj = RowLinear(width, width, config=config, pg_collection=pg_collection)
        initialize_part(self, f"{layer_name(layer_number)}.mixer", config, tensor, seed)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, norm: Norm | None = None,
                residual: bool = False, **attention_arguments: Any) -> tuple[Tensor, None]:
        refuse_arguments("MeanMixer", attention_mask=attention_mask, **attention_arguments)
        gate, value = self.in_proj(hidden_states, norm).chunk(2, dim=-1)
        out = self.out_proj(torch.sigmoid(gate + self.shift) * self._means(value))
        return hidden_states + out if residual else out, None

    def _means(self, value: Tensor) -> Tensor:
        """[l, B, C] -> the same. Over P context ranks each has all tokens of its share of the channels meanwhile."""
        size = self.context.size
        if size > 1:
            value = Exchange(value.unflatten(2, (size, -1)).movedim(2, 0), self.context).wait().flatten(0, 1)
        count = torch.arange(1, len(value) + 1, dtype=value.dtype)[:, None, None]
        means = value.cumsum(0) / count
        if size > 1:
            means = Exchange(means.unflatten(0, (size, -1)), self.context).wait().movedim(0, 2).flatten(2)
        return means


class MeanKind(MixerKind):
    """See the module. It exports to no layout of others."""

    def module(self) -> MixerModule:
        return MeanMixer

    def weights(self, config: HyenaConfig) -> Weights:
        return {**column("in_proj", ("gate", "value")), **row("out_proj", config.num_layers),
                "shift": Placement(tp_dim=0, weight_decay=False, initial=Uniform(4))}

    def refuses(self, use: Use) -> Iterator[Problem]:
        ranks = use.parallel.tensor * use.parallel.context
        if use.model.hidden_size % ranks:
            yield Misfit(f"model.hidden_size ({use.model.hidden_size}) is not a multiple of parallel.tensor x "
                         f"parallel.context ({ranks}), over which a mean deals out its channels", "model.hidden_size",
                         ranks)

    def shapes(self, section: ModelSection, tensor: int) -> list[Shape]:
        D, C = section.hidden_size, section.hidden_size // tensor
        return [Shape((2 * C, D)), Shape((2 * C,)), Shape((C,), decayed=False), Shape((D, C)), Shape((D,))]

    def parts(self, section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
        D, tokens = section.hidden_size, batch * seq_len
        return {"projections": product(tokens, D, 2 * D) + product(tokens, D, D),
                "mean": Part(tokens * D, 2 * tokens * D, tokens * D)}

    def memory(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, wide: bool,  # noqa: ARG002
               device: torch.device, split: Split = WHOLE, backend: str = "auto") -> Working:  # noqa: ARG002
        D, tokens = section.hidden_size, batch * seq_len // split.context
        return Working((FP32 + 4 * itemsize) * tokens * D, (2 * FP32 + 2 * itemsize) * tokens * D)

    def exchanged(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, split: Split,
                  rank: int | None) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        lane = itemsize * batch * (seq_len // split.context) * (section.hidden_size // split.tensor)
        return {"all_to_all": (2 * ring("all_to_all", lane, split.context),) * 2}

    def moved(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int) -> dict[str, float]:
        D, tokens = section.hidden_size, batch * seq_len
        return {"projections": product_bytes(tokens, D, 2 * D, itemsize) + product_bytes(tokens, D, D, itemsize),
                "mean": 8 * itemsize * tokens * D}


KIND = MeanKind()
