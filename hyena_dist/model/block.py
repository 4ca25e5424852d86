"""One block: x + mixer(norm(x)), then x + mlp(norm(x)), on Megatron's [l or l / T, B, D]."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.initial import initialize_part, layer_name
from hyena_dist.model.kinds import mixer_kind
from hyena_dist.model.layers import MLP, Norm, active_key
from hyena_dist.ops.dropout import DropoutKey, dropout
from hyena_dist.ops.segments import Offsets, Segments
from hyena_dist.parallel.groups import context_axis, tensor_axis


def mixer_spec(letter: str) -> ModuleSpec:
    """The mixer of a letter of `model.layer_pattern`, as Megatron's `build_module` takes it for `self_attention`; the
    model around it fills its weights. For Megatron's own GPTModel there is `model.megatron.hyena_layer_spec`."""
    return ModuleSpec(module=mixer_kind(letter).module(), params={"seed": None})


class Block(nn.Module):
    """A pre-norm block around the mixer that a ModuleSpec describes.

    Args:
        layer_number, seed: as the mixers'.
    """

    def __init__(self, config: HyenaConfig, mixer: ModuleSpec, layer_number: int,
                 pg_collection: ProcessGroupCollection | None = None, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.tensor, self.context = tensor_axis(pg_collection), context_axis(pg_collection)
        self.input_norm = Norm(config, pg_collection)
        self.mixer = build_module(mixer, config=config, layer_number=layer_number, pg_collection=pg_collection)
        self.mlp_norm = Norm(config, pg_collection)
        self.mlp = MLP(config, pg_collection, seed=None)
        initialize_part(self, layer_name(layer_number), config, self.tensor, seed)

    def forward(self, x: Tensor, key: DropoutKey | None = None,
                segments: Offsets | Segments | None = None) -> Tensor:
        """[l or l / T, B, D] -> the same.

        Args:
            key, segments: as HyenaModel's `dropout_key` and `segments`.
        """
        p = self.config.resid_dropout
        if not self.training or p == 0:
            # The branches add x themselves, which spares a tensor each.
            x, _ = self.mixer(x, norm=self.input_norm, residual=True, segments=segments)
            return self.mlp(x, self.mlp_norm, residual=True)
        if key is None:
            key = active_key(None, x.shape[1], len(x), self.config, self.tensor, self.context, x.device)
        mixed, _ = self.mixer(x, norm=self.input_norm, segments=segments)
        x = x + dropout(mixed, p, key, 2 * self.layer_number)
        return x + dropout(self.mlp(x, self.mlp_norm), p, key, 2 * self.layer_number + 1)
