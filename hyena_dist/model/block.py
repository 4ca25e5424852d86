"""One block: x + mixer(norm(x)), then x + mlp(norm(x)), on Megatron's [l or l / T, B, D]."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from hyena_dist.model.attention import AttentionMixer
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.layers import MLP, Norm
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.ops.dropout import DropoutKey, dropout

MIXER_SPECS = {"H": ModuleSpec(module=HyenaMixer), "A": ModuleSpec(module=AttentionMixer)}
"""The mixer of each letter of `model.layer_pattern`, as Megatron's `build_module` takes it for `self_attention`. Their
weights are uninitialised, as all of HyenaModel's are when it is built; for Megatron's own GPTModel there is
`model.megatron.hyena_layer_spec`."""


class Block(nn.Module):
    """A pre-norm block around the mixer that a ModuleSpec describes."""

    def __init__(self, config: HyenaConfig, mixer: ModuleSpec, layer_number: int,
                 pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.input_norm = Norm(config, pg_collection)
        self.mixer = build_module(mixer, config=config, layer_number=layer_number, pg_collection=pg_collection)
        self.mlp_norm = Norm(config, pg_collection)
        self.mlp = MLP(config, pg_collection)

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        mixed, _ = self.mixer(self.input_norm(x))
        x = x + self._dropout(mixed, key, 2 * self.layer_number)
        return x + self._dropout(self.mlp(self.mlp_norm(x)), key, 2 * self.layer_number + 1)

    def _dropout(self, x: Tensor, key: DropoutKey | None, site: int) -> Tensor:
        return x if key is None else dropout(x, self.config.resid_dropout, key, site)
