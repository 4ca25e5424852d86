"""Does a model notice a single base? Substitutions are planted at known places of held-out windows.

Two questions. Whether the changed base stands out: the AUROC of how surprised the model is at a base, changed against
unchanged ones of the same window. And whether a classifier notices: how far the outputs of one that reads the model's
mean state move when its window has some bases changed. Beside the model Markov chains of order 0 to 7 answer the first,
and those of CLASSIFIED the second: a classifier that takes the species whose chain finds the window likeliest.

What the model makes of some windows is a part in OUT.parts, and so are the Markov chains: what is killed goes on where
it was, and its numbers are the same whatever the number of ranks that share the parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.data.tokenizer import A, T, tokenizer_of
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.tasks import markov
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.perplexity import ORDERS, chains_of
from hyena_dist.tasks.score.pieces import piece, read_pieces
from hyena_dist.tasks.score.read import TOKENS
from hyena_dist.tasks.score.tables import facts_of, facts_of_shards

CLASSIFIED = (2, 5, ORDERS)
"""Orders of the Markov chains that classify windows."""
COUNTS = (1, 4, 16)
"""Substitutions of a window that a classifier reads."""
MOVED = 0.05
"""An output has moved that is further from what it was than this part of how widely the outputs of all windows lie."""
PART = 2**20
"""Bases of a part at most, or one window: what a kill can cost."""
CHANGED, LEARNT, PLAIN = "changed", "learnt", "plain"
"""Names of sets of windows: with changed bases, those that classifiers learn from, and as they are."""
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
        raise ConfigError(f"{shards}: split {split} has no window of {bases:,} known bases: give fewer --bases, "
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
        trained.need_numbers(~log_p.isnan().any())
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


class _Plan(NamedTuple):
    """The windows that are read."""

    held_out: Windows
    changed: np.ndarray
    """bool [n, bases], which bases of the windows `CHANGED` are."""
    learnt: Windows | None
    """Of the training bases; None where they are of one species, which nothing can be told apart from."""
    sets: dict[str, np.ndarray]
    """What the model reads, uint8 [n, bases], by name."""


def facts_of_file(trained: Trained, request: Request) -> dict[str, Any]:
    """Everything that decides what is found, for the header.

    Raises:
        UserError: unreadable shards; windows that the model does not take.
    """
    tokenizer, least = tokenizer_of(trained.section), _EDGE + max(COUNTS) + trained.section.kmer
    if not least <= request.bases <= tokenizer.bases(trained.seq_len):
        raise ConfigError(f"--bases {request.bases}: give {least} to the {tokenizer.bases(trained.seq_len)} that "
                          f"{trained.path} was trained on")
    if request.every > request.bases:
        raise ConfigError(f"--every {request.every}: no base of a window of {request.bases} would be changed: give 2 "
                          f"to {request.bases}")
    return {**facts_of(trained), "tokens_of_a_batch": TOKENS[next(trained.model.parameters()).device.type],
            "bases_of_a_part": PART, "bases": request.bases, **facts_of_shards(request.shards), "split": request.split,
            "every": request.every, "most": request.most}


def score_substitutions(trained: Trained, request: Request, facts: Mapping[str, Any], parts: Parts,
                        groups: Groups) -> list[Row]:
    """Both questions, of the model and of the chains. Collective.

    Args:
        facts: by `facts_of_file`.
        parts: what an earlier call has left is gone on with.

    Returns:
        On the first rank the rows, on others none.

    Raises:
        UserError: unreadable shards, without whole windows; parts of another call.
    """
    plan = agree(lambda: _plan(request), groups)
    step = max(1, PART // request.bases)
    pieces = [(name, first) for name, ids in plan.sets.items() for first in range(0, len(ids), step)]

    def of_piece(number: int) -> dict[str, np.ndarray]:
        name, first = pieces[number]
        surprise, states = read_windows(trained, plan.sets[name][first : first + step])
        if name != CHANGED:
            return {"states": states}
        return {"states": states, "aurocs": aurocs(surprise, plan.changed[first : first + step])}
    read_pieces(parts, facts, len(pieces), of_piece, groups, "parts of the windows")
    names = [name for name, _ in pieces]
    return agree(lambda: _rows(request, plan, names, parts) if groups.world.rank == 0 else [], groups)


def _plan(request: Request) -> _Plan:
    held_out = windows_of(request.shards, request.split, request.bases, request.most)
    learnt = windows_of(request.shards, "train", request.bases, 4 * request.most)
    ids, changed = planted(held_out.ids, request.bases // request.every, np.random.default_rng(0))
    if len(set(learnt.species)) < 2:
        return _Plan(held_out, changed, None, {CHANGED: ids})
    moved = {_moved(count): planted(held_out.ids, count, np.random.default_rng(count))[0] for count in COUNTS}
    return _Plan(held_out, changed, learnt, {CHANGED: ids, LEARNT: learnt.ids, PLAIN: held_out.ids, **moved})


def _moved(count: int) -> str:
    return f"{count} changed"


def _rows(request: Request, plan: _Plan, names: Sequence[str], parts: Parts) -> list[Row]:
    """Join the parts.

    Args:
        names: of the windows that each of them is of.
    """
    read = [piece(parts, number) for number in range(len(names))]
    of_model = np.concatenate([part["aurocs"] for part in read if "aurocs" in part])
    manifest, blocks = Manifest.load(request.shards), Blocks(len(plan.held_out.ids))
    tables = chains_of(parts, "tables", [Pool(manifest)])
    of_sites = {"model": of_model}
    of_sites |= {f"chain of order {order}": aurocs(each, plan.changed)
                 for order, each in enumerate(chain_surprise(tables, plan.sets[CHANGED]))}
    count = request.bases // request.every
    rows = [_row(name, "AUROC of the site", count, each, blocks) for name, each in of_sites.items()]
    if plan.learnt is None:
        return rows
    states = {name: np.concatenate([part["states"] for other, part in zip(names, read, strict=True) if other == name])
              for name in plan.sets}
    for name, outputs in _classifiers(states, plan, manifest, parts):
        rows += _moves(name, outputs, plan.held_out, blocks)
    return rows


def _classifiers(states: Mapping[str, np.ndarray], plan: _Plan, manifest: Manifest,
                 parts: Parts) -> Iterator[tuple[str, "_Outputs"]]:
    """Of the model, by its states [n, D] of each set of windows, and of the chains of some orders."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    species = [] if plan.learnt is None else plan.learnt.species
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(states[LEARNT], species)

    def by_model(name: str) -> np.ndarray:
        found = probe.decision_function(states[name])
        return np.stack([-found, found], -1) if found.ndim == 1 else found
    yield "model", _Outputs(by_model, list(probe.classes_))
    of_species = [chains_of(parts, f"tables-{number}", [Pool(manifest, regions={
        contig.name: [(0, contig.bases)] for contig in manifest.contigs if contig.species == name})])
        for number, name in enumerate(sorted(set(species)))]
    for order in CLASSIFIED:
        def by_chain(name: str, order: int = order) -> np.ndarray:
            return np.stack([-chain_surprise(tables[: order + 1], plan.sets[name])[order].mean(-1)
                             for tables in of_species], -1)
        yield f"chain of order {order}", _Outputs(by_chain, sorted(set(species)))


class _Outputs(NamedTuple):
    """A classifier."""

    of: Callable[[str], np.ndarray]
    """Of a set of windows by its name, which gives [n, classes]."""
    classes: list[str]


def _moves(name: str, outputs: _Outputs, windows: Windows, blocks: Blocks) -> list[Row]:
    plain = outputs.of(PLAIN)
    right = np.array(outputs.classes)[plain.argmax(-1)] == np.array(windows.species)
    rows = [_row(name, "accuracy", 0, right.astype(float), blocks)]
    wide = plain.std(0)
    varies = wide > 0  # of others, as those of one window, no move can be told from its width
    for count in COUNTS:
        moved = outputs.of(_moved(count))
        off, nothing = np.abs(moved - plain)[:, varies] / wide[varies], np.full(len(plain), np.nan)
        rows += [_row(name, "mean move of an output", count, off.mean(-1) if varies.any() else nothing, blocks),
                 _row(name, "outputs that move", count, (off > MOVED).mean(-1) if varies.any() else nothing, blocks),
                 _row(name, "classes that change", count, (moved.argmax(-1) != plain.argmax(-1)).astype(float), blocks)]
    return rows


def _row(model: str, what: str, count: int, values: np.ndarray, blocks: Blocks) -> Row:
    interval = blocks.interval(blocks.sums(values[:, None])[:, 0] / values.size)
    return Row(model, what, count, values.size, float(values.mean()), *interval)
