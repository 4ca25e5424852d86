"""What a model says of the windows of variants, and the scores that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hyena_dist.data.tokenizer import A, T
from hyena_dist.data.variants import Site
from hyena_dist.model.trained import Trained
from hyena_dist.tasks.score.read import TOKENS, is_base, mean_states, read
from hyena_dist.tasks.score.windows import ALLELES, STRANDS, Batch, batches

AROUND = 32
"""Bases behind the allele whose predictions are compared."""

_AT_ONCE = 64
"""Variants whose scores are made of what was observed, in float64, at a time."""

SCORES = {
    "ll_ref": "log-likelihood of the reference window, nats a base",
    "ll_alt": "the same with the alternative allele",
    "llr_mean": "ll_alt - ll_ref: below 0 the model prefers the reference",
    "llr_sum": "the same summed over the window, in nats",
    "llr_site": "the same of the allele's bases alone, given those before; of an allele that changes the length with "
                "the base behind it",
    "jsd": f"Jensen-Shannon divergence of the predictions of the {AROUND} bases behind the allele, mean, in nats",
    "embedding_l2": "Euclidean distance of the windows' mean hidden states, in float32",
    "embedding_cosine": "one less their cosine",
}
"""Each is a mean over both strands."""


@dataclass
class _Observed:
    """Of the variants of a chunk, by variant, allele and strand."""

    ll: np.ndarray
    """[n, 2, 2], log-likelihood of the window,"""
    count: np.ndarray
    """of so many bases."""
    site: np.ndarray
    """[n, 2, 2], log-likelihood of the allele; nan where nothing stands before it."""
    behind: np.ndarray
    """[n, 2, 2, AROUND, 4], log-probabilities of A, C, G and T for the bases behind the allele; nan where the window
    has ended."""
    state: np.ndarray
    """[n, 2, 2, D]."""


@torch.no_grad()
def score_sites(trained: Trained, sites: Sequence[Site], reference: np.ndarray, window: int, *,
                on_windows: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """float64 [n, SCORES] of n variants. Collective over the model's context ranks, which get the same.

    Args:
        reference: uint8 [bases] token ids.
        window: bases; at most the model's max_seq_len.
        on_windows: hears of the windows that were done.
    """
    shape = (len(sites), ALLELES, STRANDS)
    found = _Observed(np.zeros(shape), np.zeros(shape), np.full(shape, np.nan),
                      np.full((*shape, AROUND, T - A + 1), np.nan, np.float32),
                      np.zeros((*shape, trained.section.hidden_size), np.float32))
    changes = np.array([site.removed != site.alt.size for site in sites])
    device = next(trained.model.parameters()).device
    size = max(1, TOKENS[device.type] // window)
    for batch in batches(sites, reference, window, size):
        _observe(trained, batch, changes[batch.variant], device, found)
        on_windows(len(batch.lengths))
    return np.concatenate([_scores(_Observed(*(values[begin : begin + _AT_ONCE] for values in vars(found).values())))
                           for begin in range(0, len(sites), _AT_ONCE)])


def _observe(trained: Trained, batch: Batch, longer: np.ndarray, device: torch.device, found: _Observed) -> None:
    """One forward pass, and what its entries look at.

    Args:
        longer: bool [E], whether the base behind the allele counts as a part of it.
    """
    ids, lengths = (torch.from_numpy(values).to(device, torch.int64) for values in (batch.ids, batch.lengths))
    reading = read(trained, ids)
    first, behind, rows = (torch.from_numpy(values).to(device) for values in (batch.first, batch.behind, batch.row))
    end = torch.minimum(behind + torch.from_numpy(longer).to(device), lengths[rows])
    parts = [reading.picked.sum(-1), reading.sums_before((end - 1).clamp(min=0), rows)
             - reading.sums_before((first - 1).clamp(min=0), rows)]
    ll, site = reading.total(torch.cat(parts)).split([len(ids), len(rows)])
    site = site.masked_fill(first < 1, torch.nan)
    step = behind[:, None] + torch.arange(AROUND, device=device)  # [E, AROUND], tokens that are predicted
    after = reading.bases_at(rows, step - 1)
    after.masked_fill_(((step >= lengths[rows][:, None]) | (step < 1))[..., None], torch.nan)
    place, count = (batch.variant, batch.allele, batch.strand), is_base(ids[:, 1:]).sum(-1)
    found.ll[place], found.count[place] = ll.cpu().numpy()[batch.row], count.cpu().numpy()[batch.row]
    found.site[place], found.behind[place] = site.cpu().numpy(), after.cpu().numpy()
    found.state[place] = mean_states(reading, lengths).cpu().numpy()[batch.row]


def _scores(found: _Observed) -> np.ndarray:
    """[n, SCORES]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = found.ll / found.count  # [n, allele, strand]
        scores = [mean[:, 0].mean(-1), mean[:, 1].mean(-1), (mean[:, 1] - mean[:, 0]).mean(-1),
                  (found.ll[:, 1] - found.ll[:, 0]).mean(-1), _mean(found.site[:, 1] - found.site[:, 0])]
        log_p = found.behind.astype(np.float64)
        middle = np.logaddexp(log_p[:, 0], log_p[:, 1]) - np.log(2)  # [n, strand, AROUND, 4]
        divergence = (np.exp(log_p) * (log_p - middle[:, None])).sum(-1).mean(1)  # [n, strand, AROUND]
        scores.append(_mean(divergence.reshape(len(divergence), -1)))
        state = found.state.astype(np.float64)
        difference = np.linalg.norm(state[:, 1] - state[:, 0], axis=-1)
        lengths = np.linalg.norm(state, axis=-1)
        cosine = (state[:, 0] * state[:, 1]).sum(-1) / (lengths[:, 0] * lengths[:, 1])
        scores += [difference.mean(-1), (1 - cosine).mean(-1)]
    return np.stack(scores, -1)


def _mean(values: np.ndarray) -> np.ndarray:
    """[n, m] -> [n], over those that are numbers; nan where none is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)
