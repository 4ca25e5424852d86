"""Where a model is good: its perplexity on held-out bases by how many bases it sees before them, by their place in the
window, by species, G and C, case and region, beside Markov chains on exactly the same bases."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.data.manifest import Interval, Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.tokenizer import IGNORE, PAD, tokenizer_of
from hyena_dist.model.loss import token_losses
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window, slice_tokens
from hyena_dist.tasks import markov
from hyena_dist.tasks.held_out import HeldOut
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.tables import bar

ORDERS = 7
"""Markov chains are of order 0 to this."""
LEAST_CONTEXT = 16
"""Tokens."""
LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits of a forward pass of several windows."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    shards: Path
    split: str
    window: int
    """Tokens."""
    block: int
    """Bases of a block of the bootstrap."""
    regions: Path | None = None


@dataclass(frozen=True)
class Row:
    """Some of the scored bases."""

    by: str
    group: str
    bases: int
    perplexity: float
    """Per base, with an interval."""
    low: float
    high: float
    markov: list[float]
    """Of each chain, by order."""
    gain: float
    """Nats a base by which the model is better than the best of these chains, with an interval; below 0 worse."""
    gain_low: float
    gain_high: float

    def values(self) -> dict[str, Any]:
        """By the names of the columns of a file."""
        found = {key: value for key, value in vars(self).items() if key != "markov"}
        found |= {f"markov_{order}": value for order, value in enumerate(self.markov)}
        return {key: None if isinstance(value, float) and not np.isfinite(value) else value
                for key, value in found.items()}


@dataclass(frozen=True)
class Found:
    """Rows, and how many blocks their intervals are of."""

    rows: list[Row]
    blocks: int
    notes: list[str]


class _Sums:
    """Losses and numbers of scored bases, [2, labels, cells]: a cell is the windows of one class in one block."""

    def __init__(self, cells: int, kinds: int, positions: int, contexts: Sequence[int]) -> None:
        self.kinds, self.positions = np.zeros((2, kinds, cells)), np.zeros((2, positions, cells))
        self.contexts = {context: np.zeros((2, 1, cells)) for context in contexts}

    def all(self) -> list[np.ndarray]:
        return [self.kinds, self.positions, *self.contexts.values()]


def score_perplexity(trained: Trained, request: Request, groups: Groups) -> Found:
    """Read a split of shards. Collective.

    Raises:
        UserError: unreadable shards or regions, a split without bases, a window that the model does not take.
    """
    if not 2 <= request.window <= trained.seq_len:
        raise ConfigError(f"--window {request.window}: {trained.path} was trained on sequences of {trained.seq_len} "
                          f"tokens, and says nothing sensible of longer ones: give 2 to {trained.seq_len}")
    pools, tokenizer = [Pool(Manifest.load(request.shards))], tokenizer_of(trained.section)
    device = next(trained.model.parameters()).device
    size = max(1, LOGITS[device.type] // trained.section.padded_vocab_size // request.window)
    held_out = HeldOut(pools, split=request.split, seq_len=request.window, batch_size=size, regions=request.regions,
                       tokenizer=tokenizer, data=groups.data)
    block_of = _blocks(held_out, request.block)
    pairs = np.stack([block_of, np.array(held_out.class_of)], -1)
    cells, cell_of = np.unique(pairs, axis=0, return_inverse=True)
    cell_of = np.append(cell_of.reshape(-1), 0)  # numbers of windows behind the last stand for no window
    sums = _Sums(len(cells), held_out.kinds, request.window.bit_length() + 1, _contexts(request.window))
    _read(trained, held_out, cell_of, sums, groups)
    if not sums.kinds[1].sum():
        raise ConfigError(f"{request.shards}: split {request.split} has no base to score (A, C, G, T): build the "
                          "shards with some")
    chains = _chains(pools, request, held_out, cell_of, sums)
    rows = _rows(held_out, cells, sums, chains, request.window)
    blocks = int(block_of.max()) + 1
    notes = [f"there are {blocks} blocks of {request.block:,} bases, too few for intervals to be trusted: give a "
             "smaller --block, or more bases"] if blocks < 20 else []
    missing = {name for names in held_out.of_kinds.get("region", []) for name in names} - {row.group for row in rows}
    return Found(rows, blocks, notes + [f"no scored base is of class {name}" for name in sorted(missing)])


def _contexts(window: int) -> list[int]:
    """Powers of two that are shorter than the longest one of a window."""
    longest = 1 << window.bit_length() - 1
    return [1 << power for power in range(LEAST_CONTEXT.bit_length() - 1, longest.bit_length() - 1)]


def _blocks(held_out: HeldOut, bases: int) -> np.ndarray:
    """int64 [windows], which block each is in: windows of one interval in a row."""
    found, number, room, before = [], -1, 0, None
    for _, pieces in held_out.batches.windows:
        interval, start, end = pieces[0]
        if interval != before or room <= 0:
            number, room, before = number + 1, bases, interval
        room -= end - start
        found.append(number)
    return np.array(found)


def _read(trained: Trained, held_out: HeldOut, cell_of: np.ndarray, sums: _Sums, groups: Groups) -> None:
    """One pass over the windows, and one over their parts for each length of context."""
    device = next(trained.model.parameters()).device
    with bar("windows", groups) as shown:
        task = shown.add_task("", total=len(held_out.batches))
        for batch in held_out.batches:
            ids, targets, windows = batch.to(device)
            cells = cell_of[np.minimum(windows.cpu().numpy(), cell_of.size - 1)]
            losses, scored, first = _losses(trained, ids, targets)
            scored *= batch.tokenizer.stride
            places = first + np.arange(losses.shape[1])
            kinds = np.zeros(losses.shape, np.int64)
            inside = places < ids.shape[1]
            kinds[:, inside] = held_out.kinds_of(batch).numpy()[:, places[inside]]
            _add(sums.kinds, losses, scored, kinds, cells)
            bins = np.broadcast_to(np.frexp(places)[1], losses.shape)  # so many bits has the number
            _add(sums.positions, losses, scored, np.minimum(bins, sums.positions.shape[1] - 1), cells)
            for context, of_context in sums.contexts.items():
                parts, of_parts = _parts(ids, context), _parts(targets, context)
                of_parts[:, : context // 2] = IGNORE
                losses, scored, _ = _losses(trained, parts, of_parts)
                scored *= batch.tokenizer.stride
                _add(of_context, losses, scored, np.zeros(losses.shape, np.int64),
                     cells.repeat(len(parts) // len(ids)))
            shown.advance(task)
    if groups.data_context.size > 1:
        for values in sums.all():
            whole = torch.from_numpy(values).to(device)
            dist.all_reduce(whole, group=groups.data_context.group)
            values[...] = whole.cpu().numpy()


def _parts(ids: Tensor, context: int) -> Tensor:
    """[B, L] -> [B n, context]: the targets from H to 2 H, H half of the longest power of two of L, in pieces of half a
    context, each with half a context before it."""
    half, middle = context // 2, 1 << ids.shape[1].bit_length() - 2
    return ids[:, middle - half : 2 * middle].unfold(1, context, half).reshape(-1, context).clone()


@torch.no_grad()
def _losses(trained: Trained, ids: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """Losses and which are scored, float64 [B, l], of this rank's targets, and the first of these. Collective over the
    context ranks."""
    model, first = trained.model, 0
    axis, multiple = model.context, model.token_multiple
    if axis.size > 1:
        first, _, _ = part_of_window(ids.shape[1], axis, multiple=multiple)
        ids, targets = (slice_tokens(values, axis, multiple=multiple, fill=fill)
                        for values, fill in ((ids, PAD), (targets, IGNORE)))
    try:
        losses = token_losses(model(ids), targets)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"windows of --window {ids.shape[1]} do not fit into the free memory: free some, or give "
                          "shorter ones") from error
    return losses.double().cpu().numpy(), (targets != IGNORE).double().cpu().numpy(), first


def _add(sums: np.ndarray, losses: np.ndarray, scored: np.ndarray, labels: np.ndarray, cells: np.ndarray) -> None:
    """Into [2, labels, cells]: values [B, l], their labels, and the cell of each row."""
    places = (labels * sums.shape[2] + cells[:, None]).reshape(-1)
    size = sums.shape[1] * sums.shape[2]
    for of_kind, values in zip(sums, (losses, scored), strict=True):
        of_kind += np.bincount(places, values.reshape(-1), minlength=size).reshape(of_kind.shape)


def _chains(pools: Sequence[Pool], request: Request, held_out: HeldOut, cell_of: np.ndarray,
            sums: _Sums) -> dict[str, np.ndarray]:
    """By kind and by position, float64 [orders, 2, labels, cells]."""
    cells = sums.kinds.shape[2]

    def by_kind(number: int, interval: Interval, start: int, soft: np.ndarray) -> np.ndarray:
        windows, _, kinds = held_out.places(number, interval, start, soft)
        return kinds * cells + cell_of[windows]

    def by_position(number: int, interval: Interval, start: int, soft: np.ndarray) -> np.ndarray:
        windows, places, _ = held_out.places(number, interval, start, soft)
        return np.minimum(np.frexp(places)[1], sums.positions.shape[1] - 1) * cells + cell_of[windows]

    tables = markov.fit(pools, ORDERS)
    return {name: markov.score(tables, pools, request.split, labels=values[0].size, label=label,
                               tokenizer=held_out.tokenizer).reshape(-1, *values.shape)
            for name, values, label in (("kinds", sums.kinds, by_kind), ("positions", sums.positions, by_position))}


def _rows(held_out: HeldOut, cells: np.ndarray, sums: _Sums, chains: Mapping[str, np.ndarray],
          window: int) -> list[Row]:
    """Every group's row."""
    block_of, class_of = cells.T
    blocks = Blocks(int(block_of.max()) + 1)

    def row(by: str, group: str, model: np.ndarray, of_chains: np.ndarray) -> list[Row]:
        """Of sums [2, cells] and [orders, 2, cells]; nothing where no base is scored."""
        if not model[1].any():
            return []
        values = np.concatenate([model, of_chains[:, 0]])  # [2 + orders, cells]
        by_block = np.stack([np.bincount(block_of, each, minlength=blocks.count) for each in values], -1)
        return [_row(by, group, by_block, blocks)]

    whole, of_chains = sums.kinds.sum(1), chains["kinds"].sum(2)
    rows = row("all", "all", whole, of_chains)
    for what, names in held_out.of_kinds.items():
        for name, chosen in _members(names):
            rows += row(what, name, sums.kinds[:, chosen].sum(1), chains["kinds"][:, :, chosen].sum(2))
    for what, names in held_out.of_classes.items():
        for name, chosen in _members(names):
            inside = chosen[class_of]
            rows += row(what, name, whole * inside, of_chains * inside)
    last = window.bit_length() - 1  # the position of the targets of every context
    for context, values in (*sums.contexts.items(), (1 << last, sums.positions[:, last : last + 1])):
        rows += row("context", f"{context // 2 + 1:,} to {context:,}", values[:, 0], chains["positions"][:, :, last])
    for bits in range(sums.positions.shape[1]):
        name = "1" if not bits else f"{(1 << bits - 1) + 1:,} to {min(1 << bits, window):,}"
        rows += row("position", name, sums.positions[:, bits], chains["positions"][:, :, bits])
    return rows


def _members(names: Sequence[Collection[str]]) -> list[tuple[str, np.ndarray]]:
    """Each name, and bool [n], which have it."""
    found = dict.fromkeys(name for of_one in names for name in of_one)
    return [(name, np.array([name in of_one for of_one in names])) for name in sorted(found, key=_in_order)]


def _in_order(name: str) -> tuple[int, str]:
    """Decile 10 comes behind decile 9."""
    return len(name.partition(":")[0]) if name.startswith("decile ") else 0, name


def _row(by: str, group: str, by_block: np.ndarray, blocks: Blocks) -> Row:
    """Of [blocks, 2 + orders]: the model's losses, the bases, and the losses of each chain."""
    total, drawn = by_block.sum(0), blocks.sums(by_block)
    best = 2 + int(total[2:].argmin())
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean, of_draws = np.exp(total[0] / total[1]), np.exp(drawn[:, 0] / drawn[:, 1])
        gain = (drawn[:, best] - drawn[:, 0]) / drawn[:, 1]
        chains = np.exp(total[2:] / total[1]).tolist()
    return Row(by, group, int(total[1]), float(mean), *blocks.interval(of_draws), chains,
               float((total[best] - total[0]) / total[1]), *blocks.interval(gain))
