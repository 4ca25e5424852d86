"""One forward pass of a trained model: the same numbers by one rank, and by context ranks that share the sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from hyena_dist.data.tokenizer import PAD, A, T
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.collectives import all_reduce
from hyena_dist.parallel.groups import Axis
from hyena_dist.parallel.tokens import part_of_window, slice_tokens

TOKENS = {"cpu": 2**14, "cuda": 2**18}
"""Of a forward pass; a batch is at least one window."""


def is_base(ids: Tensor) -> Tensor:
    """Which tokens are A, C, G or T."""
    return (ids >= A) & (ids <= T)


class Reading(NamedTuple):
    """What this rank has of a forward pass over L tokens: those from `first` on, l of them. Over several ranks the last
    ones may lie behind L."""

    log_p: Tensor
    """[B, l, V] in float32, log-probabilities of the token behind each."""
    states: Tensor
    """[l, B, D], what the head reads."""
    picked: Tensor
    """float64 [B, l], the log-probability of the token that stands behind each; 0 where that is no A, C, G or T."""
    first: int
    axis: Axis

    def sums_before(self, places: Tensor, rows: Tensor) -> Tensor:
        """float64 [E]: the sum of this rank's `picked` before each place of a row; a difference of two of them, summed
        over the ranks (`total`), is that of the tokens between."""
        sums = torch.nn.functional.pad(self.picked.cumsum(-1), (1, 0))  # [B, l + 1]
        return sums[rows, (places - self.first).clamp(0, self.picked.shape[1])]

    def total(self, values: Tensor) -> Tensor:
        """The sum over the context ranks."""
        return values if self.axis.size == 1 else all_reduce(values, self.axis)

    def bases_at(self, rows: Tensor, places: Tensor) -> Tensor:
        """[E, n] places of tokens -> [E, n, 4]: log-probabilities of the four bases behind each, which sum to 1. Places
        outside of the L tokens give numbers without a meaning."""
        local = places - self.first
        length = self.log_p.shape[1]
        values = self.log_p[rows[:, None], local.clamp(0, length - 1), A : T + 1]
        if self.axis.size > 1:
            values = self.total(values.masked_fill(((local < 0) | (local >= length))[..., None], 0))
        return torch.log_softmax(values, -1)


def read(trained: Trained, ids: Tensor) -> Reading:
    """Read whole sequences. Collective over the model's context ranks, all of which give the same ones.

    Args:
        ids: int64 [B, L], PAD behind the end of a shorter sequence.

    Raises:
        ConfigError: a prediction of a base is NaN.
    """
    model = trained.model
    axis, multiple = model.context, model.token_multiple
    first, count = 0, ids.shape[1]
    own, behind = ids, ids[:, 1:]
    if axis.size > 1:
        first, count, _ = part_of_window(ids.shape[1], axis, multiple=multiple)
        own = slice_tokens(ids, axis, multiple=multiple, fill=PAD)
        behind = slice_tokens(behind, axis, multiple=count * axis.size, fill=PAD)
    logits, states = model.logits_and_states(own)
    log_p = torch.log_softmax(logits.float(), -1)
    targets = torch.nn.functional.pad(behind, (0, count - behind.shape[1]), value=PAD)
    picked = log_p.gather(-1, targets[..., None])[..., 0].masked_fill_(~is_base(targets), 0).double()
    trained.need_numbers(~picked.isnan().any())
    return Reading(log_p, states, picked, first, axis)


def mean_states(reading: Reading, lengths: Tensor) -> Tensor:
    """float32 [B, D]: the mean state of the first so many tokens of each sequence."""
    states = reading.states
    place = reading.first + torch.arange(states.shape[0], device=states.device)
    inside = place[:, None] < lengths  # [l, B]
    if not inside.all():
        states = states.masked_fill(~inside[..., None], 0)
    return reading.total(states.sum(0, dtype=torch.float32)) / lengths[:, None]
