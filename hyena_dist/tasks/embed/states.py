"""Hidden states of sequences, averaged over bins: on one rank, and the same over context ranks that share a sequence.

Legend: L bases, D channels, l tokens on a rank, B sequences of a forward pass.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.data.tokenizer import PAD
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.collectives import all_reduce
from hyena_dist.parallel.tokens import part_of_window, slice_tokens

TOKENS = {"cpu": 2**14, "cuda": 2**18}
"""Of a forward pass; it has at least one sequence."""


def rows_of(bases: int, bin: int | None) -> int:
    """How many rows a sequence has: one for each bin, the last of which may be shorter; None: one for all of it."""
    return -(-bases // (bin or bases))


@torch.no_grad()
def embed(trained: Trained, sequences: Sequence[np.ndarray], bin: int | None, layer: int | None) -> list[np.ndarray]:
    """float32 [rows, D] of each sequence: the mean state of the bases of each bin. Collective over the model's context
    ranks, all of which give the same sequences and get the same rows.

    Args:
        sequences: uint8 [L] token ids, at least one of each.
        bin: bases; None: as many as the sequence has.
        layer: after so many layers, before any norm; None: what the head reads.

    Raises:
        ConfigError: a state is no finite number.
    """
    device = next(trained.model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda place: -sequences[place].size)  # so that little is padded
    found: dict[int, np.ndarray] = {}
    while order:
        longest = sequences[order[0]].size
        size = max(1, TOKENS[device.type] // longest)
        chosen, order = order[:size], order[size:]
        ids = np.full((len(chosen), longest), PAD, np.uint8)
        for row, place in enumerate(chosen):
            ids[row, : sequences[place].size] = sequences[place]
        states, first = _states(trained, torch.from_numpy(ids).to(device, torch.int64), layer)
        for row, place in enumerate(chosen):
            found[place] = _means(trained, states[:, row], first, sequences[place].size, bin)
    return [found[place] for place in range(len(sequences))]


def _states(trained: Trained, ids: Tensor, layer: int | None) -> tuple[Tensor, int]:
    """int64 [B, L] -> this rank's [l, B, D], and which token is its first."""
    model, first = trained.model, 0
    if model.context.size > 1:
        first, _, _ = part_of_window(ids.shape[1], model.context, multiple=model.token_multiple)
        ids = slice_tokens(ids, model.context, multiple=model.token_multiple, fill=PAD)
    return model.hidden_states(ids) if layer is None else model.states_after(ids, layer), first


def _means(trained: Trained, states: Tensor, first: int, bases: int, bin: int | None) -> np.ndarray:
    """This rank's states of one sequence [l, D], from its token `first` on -> [rows, D] of all ranks."""
    size, rows, axis = bin or bases, rows_of(bases, bin), trained.model.context
    own = states[: max(bases - first, 0)].float()  # what is behind is padding
    # A bin is summed in float64: float32 loses three digits over a million bases.
    sums = torch.zeros(rows, own.shape[1], device=own.device, dtype=torch.float32 if size == 1 else torch.float64)
    if len(own):
        before = first % size  # of its first bin another rank has so many
        whole = F.pad(own, (0, 0, before, -(before + len(own)) % size)).unflatten(0, (-1, size))
        sums[first // size : first // size + len(whole)] = whole.sum(1, dtype=sums.dtype)
    if axis.size > 1:
        sums = all_reduce(sums, axis)
    counts = torch.full((rows, 1), size, device=own.device, dtype=sums.dtype)
    counts[-1] = bases - (rows - 1) * size
    means = (sums / counts).float()
    trained.need_numbers(means.isfinite().all())
    return means.cpu().numpy()
