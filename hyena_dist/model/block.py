"""One block: x + mixer(norm(x)), then x + mlp(norm(x)), on Megatron's [l or l / T, B, D]."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from hyena_dist.model.attention import AttentionMixer
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.layers import MLP, Norm
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.ops.dropout import DropoutKey, dropout


def hyena_mixer_spec() -> ModuleSpec:
    """What Megatron's layer specs take as `self_attention` to make a Hyena layer."""
    return ModuleSpec(module=HyenaMixer)


MIXER_SPECS = {"H": hyena_mixer_spec(), "A": ModuleSpec(module=AttentionMixer)}
"""The mixer of each letter of `model.layer_pattern`."""


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
