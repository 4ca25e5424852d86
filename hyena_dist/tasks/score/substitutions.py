"""Does a model notice a single base? Substitutions are planted at known places of held-out windows.

Two questions. Whether the changed base stands out: the AUROC of how surprised the model is at a base, changed against
unchanged ones of the same window. And whether a classifier notices: how far the outputs of one that reads the model's
mean state move when its window has some bases changed. Markov chains of order 0 to 7 answer both beside the model:
their classifier takes the species whose chain finds the window likeliest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.data.tokenizer import A, T, tokenizer_of
from hyena_dist.model.trained import Trained
from hyena_dist.tasks import markov
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.read import TOKENS

ORDERS = 7
COUNTS = (1, 4, 16)
"""Substitutions of a window that a classifier reads."""
MOVED = 0.05
"""An output has moved that is further from what it was than this part of how widely the outputs of all windows lie."""
_EDGE = 8
"""Bases at the start of a window in which nothing is planted: little is before them."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    shards: Path
    split: str
    bases: int
    """Of a window."""
    every: int
    """One base in so many is changed, for the AUROC."""
    most: int
    """Windows at most, of the split; and of the training bases, from which classifiers learn."""


class Row(NamedTuple):
    """One number of one model, with an interval where it is a mean over windows."""

    model: str
    what: str
    substitutions: int
    """Of a window."""
    windows: int
    value: float
    low: float
    high: float


class Windows(NamedTuple):
    """Held-out windows of known bases."""

    ids: np.ndarray
    """uint8 [n, bases], token ids of single bases."""
    species: list[str]


def windows_of(shards: Path, split: str, bases: int, most: int) -> Windows:
    """Whole windows at even distances over a split, without unknown bases.

    Raises:
        ConfigError: there is none.
    """
    batches = ValidationBatches(Manifest.load(shards), split=split, seq_len=bases, batch_size=1, tokens=bases * most)
    found, species = [], []
    for number, batch in enumerate(batches):
        ids = batch.ids[0, :bases].numpy()
        if ((ids >= A) & (ids <= T)).all():
            found.append(ids)
            species.append(batches.classes[batches.class_of[number]][1])
    if not found:
        raise ConfigError(f"{shards}: split {split} has no window of {bases:,} known bases: give a shorter --window, "
                          "or other shards")
    return Windows(np.stack(found), species)


def planted(ids: np.ndarray, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, bases] with so many bases of each replaced by others, each as likely, and bool [n, bases], which."""
    places = np.argsort(random.random((len(ids), ids.shape[1] - _EDGE)), axis=1)[:, :count] + _EDGE
    changed = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(changed, places, True, axis=1)
    other = A + (ids - A + random.integers(1, 4, ids.shape)) % 4
    return np.where(changed, other, ids).astype(np.uint8), changed


@torch.no_grad()
def read_windows(trained: Trained, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How surprised the model is at each base, float64 [n, bases] in nats, nan where it predicts none; a k-mer that
    stands beside the next is as surprising at each of its bases. And the mean states, float32 [n, D].

    Args:
        ids: uint8 [n, bases], known ones.
    """
    tokenizer, device = tokenizer_of(trained.section), next(trained.model.parameters()).device
    k, stride = tokenizer.k, tokenizer.stride
    surprise, states = np.full(ids.shape, np.nan), []
    tokens = torch.from_numpy(np.stack([tokenizer.of_bases(row) for row in ids]).astype(np.int64))
    size = max(1, TOKENS[device.type] // tokens.shape[1])
    for begin in range(0, len(ids), size):
        batch = tokens[begin : begin + size].to(device)
        logits, state = trained.model.logits_and_states(batch)
        log_p = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch[:, 1:, None])[..., 0]
        of_bases = np.repeat(-log_p.double().cpu().numpy(), stride, axis=1)
        surprise[begin : begin + size, k : k + of_bases.shape[1]] = of_bases  # the first token's bases are not told
        states.append(state.float().mean(0).cpu().numpy())
    return surprise, np.concatenate(states)


def chain_surprise(tables: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
    """float64 [orders, n, bases] in nats, of chains by `markov.fit`."""
    found = np.zeros((len(tables), *ids.shape))
    for number, row in enumerate(ids):
        best = np.zeros(row.size)
        for order, (word, whole) in enumerate(markov.words(row, 0, len(tables) - 1)):
            best[whole] = tables[order][word[whole]]
            found[order, number] = -best
    return found


def aurocs(surprise: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """float64 [n]: for each window the share of pairs of a changed and an unchanged base in which the changed one is
    the more surprising."""
    from sklearn.metrics import roc_auc_score

    found = []
    for values, positive in zip(surprise, changed, strict=True):
        known = ~np.isnan(values)
        found.append(roc_auc_score(positive[known], values[known]))
    return np.array(found)


def score_substitutions(trained: Trained, request: Request) -> list[Row]:
    """Both questions, of the model and of the chains.

    Raises:
        UserError: unreadable shards, without whole windows; a window that the model does not take.
    """
    tokenizer, least = tokenizer_of(trained.section), _EDGE + max(COUNTS) + trained.section.kmer
    if not least <= request.bases <= tokenizer.bases(trained.seq_len):
        raise ConfigError(f"--window: {request.bases} bases: give {least} to the {tokenizer.bases(trained.seq_len)} "
                          f"that {trained.path} was trained on")
    windows, random = windows_of(request.shards, request.split, request.bases, request.most), np.random.default_rng(0)
    count, blocks = max(1, request.bases // request.every), Blocks(len(windows.ids))
    changed_ids, changed = planted(windows.ids, count, random)
    tables = markov.fit([Pool(Manifest.load(request.shards))], ORDERS)
    surprises = {"model": read_windows(trained, changed_ids)[0]}
    surprises |= {f"chain of order {order}": each for order, each in enumerate(chain_surprise(tables, changed_ids))}
    rows = [_row(name, "AUROC of the site", count, aurocs(each, changed), blocks) for name, each in surprises.items()]
    learnt = windows_of(request.shards, "train", request.bases, 4 * request.most)
    if len(set(learnt.species)) < 2:
        return rows
    for name, outputs in _classifiers(trained, request, learnt):
        rows += _moves(name, outputs, windows, blocks)
    return rows


def _classifiers(trained: Trained, request: Request, learnt: Windows) -> Iterator[tuple[str, "_Outputs"]]:
    """Of the model and of the chains of the order that knows the training windows best: [n, bases] -> [n, species]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = sorted(set(learnt.species))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(read_windows(trained, learnt.ids)[1], learnt.species)

    def by_model(ids: np.ndarray) -> np.ndarray:
        found = probe.decision_function(read_windows(trained, ids)[1])
        return np.stack([-found, found], -1) if found.ndim == 1 else found
    yield "model", _Outputs(by_model, list(probe.classes_))
    manifest = Manifest.load(request.shards)
    of_species = [markov.fit([Pool(manifest, regions={contig.name: [(0, contig.bases)] for contig in manifest.contigs
                                                      if contig.species == name})], ORDERS) for name in names]
    for order in (2, 5, ORDERS):
        def by_chain(ids: np.ndarray, order: int = order) -> np.ndarray:
            return np.stack([-chain_surprise(tables[: order + 1], ids)[order].mean(-1) for tables in of_species], -1)
        yield f"chain of order {order}", _Outputs(by_chain, names)


class _Outputs(NamedTuple):
    """A classifier."""

    of: Callable[[np.ndarray], np.ndarray]
    """Of windows [n, bases], which gives [n, classes]."""
    classes: list[str]


def _moves(name: str, outputs: _Outputs, windows: Windows, blocks: Blocks) -> list[Row]:
    plain = outputs.of(windows.ids)
    right = np.array(outputs.classes)[plain.argmax(-1)] == np.array(windows.species)
    rows = [_row(name, "accuracy", 0, right.astype(float), blocks)]
    wide = plain.std(0)
    for count in COUNTS:
        moved = outputs.of(planted(windows.ids, count, np.random.default_rng(count))[0])
        off = np.abs(moved - plain) / wide
        rows += [_row(name, "mean move of an output", count, off.mean(-1), blocks),
                 _row(name, "outputs that move", count, (off > MOVED).mean(-1), blocks),
                 _row(name, "classes that change", count, (moved.argmax(-1) != plain.argmax(-1)).astype(float), blocks)]
    return rows


def _row(model: str, what: str, count: int, values: np.ndarray, blocks: Blocks) -> Row:
    interval = blocks.interval(blocks.sums(values[:, None])[:, 0] / values.size)
    return Row(model, what, count, values.size, float(values.mean()), *interval)
