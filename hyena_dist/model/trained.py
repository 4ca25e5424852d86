"""A trained language model, as what only reads it takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.kinds import refuse_context
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.groups import Groups


@dataclass(frozen=True)
class Trained:
    """A model of next tokens, in eval mode."""

    section: ModelSection
    model: HyenaModel
    """With weights in float32; it computes in `precision`."""
    path: Path
    """Where its weights were found."""
    seq_len: int
    """Tokens of the longest sequences that it was trained on, as far as its files tell: else its max_seq_len."""
    precision: str = "fp32"
    """As `train.precision`."""

    def to(self, device: torch.device | str, precision: str, groups: Groups | None = None) -> "Trained":
        """The same on another device, computing in another precision; a copy, where it is not the same already.

        Args:
            groups: whose context ranks split each sequence; None: this rank reads whole ones.

        Raises:
            ConfigError: this model cannot be split over so many context ranks.
        """
        groups = groups or Groups.single()
        same = precision == self.precision and self.model.context.size == groups.context.size
        if same and next(self.model.parameters()).device == torch.device(device):
            return self
        refuse_context(self.section, groups.context.size)
        config = hyena_config(self.section, precision=precision, parallel=ParallelSection(context=groups.context.size))
        model = HyenaModel(config, groups.collection())
        model.load_state_dict(self.model.state_dict())
        return replace(self, model=model.to(device).eval(), precision=precision)

    def need_numbers(self, are_numbers: bool | torch.Tensor) -> None:
        """Refuse a model that predicts nothing: its training has diverged, or it is too large for its precision.

        Args:
            are_numbers: whether what it computed is.

        Raises:
            ConfigError: it is not.
        """
        if not are_numbers:
            raise ConfigError(f"{self.path}: its predictions are no numbers (NaN) in {self.precision}: give "
                              f"{'' if self.precision == 'fp32' else '--precision fp32, or '}another checkpoint")

    def digest(self) -> str:
        """Of its weights (`weights_digest`)."""
        return weights_digest(self.model)


def weights_digest(model: HyenaModel) -> str:
    """sha256 of the weights with their names, in float32: the same whatever file they come from."""
    return tensors_digest(dict(model.named_parameters()))


def tensors_digest(weights: Mapping[str, Tensor]) -> str:
    """As `weights_digest`, of weights by their names."""
    found = sha256()
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {list(weight.shape)}\n".encode())
        found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
