"""Soft prompts (Lester et al. 2021): learnt vectors stand in front of each sequence where tokens have embeddings, and
the model behind them stays as it is."""

import torch
from torch import Tensor, nn

from hyena_dist.model.initial import initialize
from hyena_dist.model.layers import whole
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.placement import Normal, Placement
from hyena_dist.parallel.groups import Axis

PLACEMENT = Placement(weight_decay=False, initial=Normal())
"""Of the vectors; every tensor rank holds all of them."""


class Prompt(nn.Module):
    """Embeddings of a rank's tokens [l or l / T, B, D] -> the same, with the vectors in place of the first tokens of
    the whole sequences, whatever those tokens are. On context ranks, and under sequence parallelism on tensor ranks, a
    rank has the vectors that lie in its slice."""

    def __init__(self, model: HyenaModel, tokens: int) -> None:
        super().__init__()
        weight = model.embedding.word_embeddings.weight
        self.vectors = nn.Parameter(weight.new_empty(tokens, weight.shape[1]))
        self.context = model.context
        self.sequence = model.tensor if model.config.sequence_parallel else Axis()

    def forward(self, x: Tensor) -> Tensor:
        first = (self.context.rank * self.sequence.size + self.sequence.rank) * len(x)
        # A rank whose slice has none of the vectors takes part all the same, with a gradient of zeros: it would miss in
        # the collectives of the others.
        here = whole(self.vectors, self.sequence)[first : first + len(x)]
        return torch.cat([here[:, None].expand(-1, x.shape[1], -1).to(x.dtype), x[len(here):]])


def add_prompt(model: HyenaModel, tokens: int, *, seed: int) -> None:
    """Freeze every weight of a model, and let its first so many tokens be learnt vectors.

    Args:
        seed: of their first values.
    """
    model.requires_grad_(False)
    prompt, name = Prompt(model, tokens), "embedding.prompt.vectors"
    initialize(prompt, {name: PLACEMENT}, Axis(), seed, prefix="embedding.prompt.")
    model.embedding.prompt = prompt
    model.adapters[name] = PLACEMENT
