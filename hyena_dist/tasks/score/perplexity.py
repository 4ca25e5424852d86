"""Where a model is good: its perplexity on held-out bases by how many bases it sees before them, by their place in the
window, by species, G and C, case and region, beside Markov chains on exactly the same bases.

The sums of every batch of windows are a part in OUT.parts, and so are the Markov chains and their sums: what is killed
goes on where it was, and its numbers are the same whatever the number of ranks that share the batches.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.data.manifest import Interval, Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.tokenizer import IGNORE, PAD, tokenizer_of
from hyena_dist.model.loss import token_losses
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.collectives import all_reduce
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window, slice_tokens
from hyena_dist.runtime.agree import agree
from hyena_dist.tasks import markov
from hyena_dist.tasks.held_out import HeldOut, in_order
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.pieces import piece, read_pieces
from hyena_dist.tasks.score.read import TOKENS
from hyena_dist.tasks.score.tables import digest_of, facts_of, facts_of_shards

ORDERS = 7
"""Markov chains are of order 0 to this."""
LEAST_CONTEXT = 16
"""Tokens."""
ENOUGH = 20
"""Blocks of an interval that is to be trusted."""
MOST_NAMED = 8
"""Groups that a note names; the table has all."""
LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits of a forward pass of several windows, which is of TOKENS at most: a batch is what a kill can cost."""


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
    """Per base, with an interval; nan where there is one block."""
    low: float
    high: float
    markov: list[float]
    """Of each chain, by order."""
    gain: float
    """Nats a base by which the model is better than the best of these chains, with an interval; below 0 worse."""
    gain_low: float
    gain_high: float
    blocks: int
    """That have such bases."""

    def values(self) -> dict[str, Any]:
        """By the names of the columns of a file."""
        found = {key: value for key, value in vars(self).items() if key != "markov"}
        return found | {f"markov_{order}": value for order, value in enumerate(self.markov)}


@dataclass(frozen=True)
class Found:
    """Rows, and how many blocks their intervals are of."""

    rows: list[Row]
    blocks: int
    notes: list[str]


class _Sums:
    """Losses and numbers of scored bases, [2, labels, cells]: a cell is the windows of one class in one block."""

    def __init__(self, cells: int, kinds: int, window: int) -> None:
        self.kinds, self.positions = np.zeros((2, kinds, cells)), np.zeros((2, window.bit_length() + 1, cells))
        self.contexts = {context: np.zeros((2, 1, cells)) for context in _contexts(window)}

    def all(self) -> dict[str, np.ndarray]:
        """Of kinds, of positions and of each context, by name."""
        return {"kinds": self.kinds, "positions": self.positions,
                **{f"context_{context}": values for context, values in self.contexts.items()}}


class _Cells(NamedTuple):
    """Which windows are summed together."""

    pairs: np.ndarray
    """int64 [cells, 2], the block and the class of each."""
    of_window: np.ndarray
    """int64 [windows + 1]. Numbers of windows behind the last stand for no window, and score nothing."""


def facts_of_file(trained: Trained, request: Request) -> dict[str, Any]:
    """Everything that decides what is found, for the header.

    Raises:
        UserError: unreadable shards or regions, a window that the model does not take.
    """
    if request.window < 2:
        raise ConfigError(f"--window {request.window}: no token of it stands behind another, by which it is predicted: "
                          f"give 2 to {trained.seq_len}")
    if request.window > trained.seq_len:
        raise ConfigError(f"--window {request.window}: {trained.path} was trained on sequences of {trained.seq_len} "
                          f"tokens, and says nothing sensible of longer ones: give 2 to {trained.seq_len}")
    return {**facts_of(trained), "windows_of_a_batch": _batch_size(trained, request), "window": request.window,
            **facts_of_shards(request.shards), "split": request.split, "regions": str(request.regions or ""),
            "regions_sha256": "" if request.regions is None else digest_of(request.regions, "--regions"),
            "block": request.block}


def _batch_size(trained: Trained, request: Request) -> int:
    device = next(trained.model.parameters()).device.type
    return max(1, min(LOGITS[device] // trained.section.padded_vocab_size, TOKENS[device]) // request.window)


def score_perplexity(trained: Trained, request: Request, facts: Mapping[str, Any], parts: Parts,
                     groups: Groups) -> Found | None:
    """Read a split of shards. Collective.

    Args:
        facts: by `facts_of_file`.
        parts: what an earlier call has left is gone on with.

    Returns:
        On the first rank what was found.

    Raises:
        UserError: unreadable shards or regions, a split without bases, parts of another call.
    """
    tokenizer = tokenizer_of(trained.section)
    pools = [Pool(agree(lambda: Manifest.load(request.shards), groups))]
    held_out = agree(lambda: HeldOut(pools, split=request.split, seq_len=request.window, regions=request.regions,
                                     batch_size=_batch_size(trained, request), tokenizer=tokenizer), groups)
    cells = _cells(held_out, request.block)
    read_pieces(parts, facts, len(held_out.batches),
                lambda number: _read(trained, request, held_out, cells, number, groups), groups, "batches")
    return agree(lambda: _found(pools, request, held_out, cells, parts) if groups.world.rank == 0 else None, groups)


def _found(pools: Sequence[Pool], request: Request, held_out: HeldOut, cells: _Cells, parts: Parts) -> Found:
    """Join the parts, in the order of the batches."""
    sums = _Sums(len(cells.pairs), held_out.kinds, request.window)
    for number in range(len(held_out.batches)):
        of_batch = piece(parts, number)
        for name, values in sums.all().items():
            values[:, :, of_batch["cells"]] += of_batch[name]
    if not sums.kinds[1].sum():
        raise ConfigError(f"{request.shards}: split {request.split} has no base to score (A, C, G, T): build the "
                          "shards with some")
    chains = parts.once("chains", lambda: _chains(pools, request, held_out, cells.of_window, sums, parts))
    rows = _rows(held_out, cells.pairs, sums, chains, request.window)
    blocks = int(cells.pairs[:, 0].max()) + 1
    notes = _few_blocks(rows, blocks, request.block)
    missing = {name for names in held_out.of_kinds.get("region", []) for name in names} - {row.group for row in rows}
    return Found(rows, blocks, notes + [f"no scored base is of class {name}" for name in sorted(missing)])


def _few_blocks(rows: Sequence[Row], blocks: int, bases: int) -> list[str]:
    """A note on intervals of too few blocks: of all, or of some groups alone."""
    if blocks < ENOUGH:
        return [f"there are {blocks} blocks of {bases:,} bases, too few for intervals to be trusted: give a smaller "
                "--block, or more bases"]
    few = [f"{row.by} {row.group} ({row.blocks})" for row in rows if row.blocks < ENOUGH]
    more = ["..."] if len(few) > MOST_NAMED else []
    return [f"{len(few)} groups have bases in fewer than {ENOUGH} blocks, too few for their intervals to be trusted: "
            f"{', '.join(few[:MOST_NAMED] + more)}; give a smaller --block, or more bases"] if few else []


def _contexts(window: int) -> list[int]:
    """Powers of two that are shorter than the longest one of a window."""
    longest = 1 << window.bit_length() - 1
    return [1 << power for power in range(LEAST_CONTEXT.bit_length() - 1, longest.bit_length() - 1)]


def _blocks(held_out: HeldOut, bases: int) -> np.ndarray:
    """int64 [windows], which block each is in: windows in a row, across the ends of intervals, until a block has so
    many bases. Were every interval a block of its own, an assembly of short contigs would have as many blocks."""
    found, number, room = [], -1, 0
    for _, pieces in held_out.batches.windows:
        if room <= 0:
            number, room = number + 1, bases
        room -= sum(end - start for _, start, end in pieces)
        found.append(number)
    return np.array(found)


def _cells(held_out: HeldOut, block: int) -> _Cells:
    pairs = np.stack([_blocks(held_out, block), np.array(held_out.class_of)], -1)
    cells, of_window = np.unique(pairs, axis=0, return_inverse=True)
    return _Cells(cells, np.append(of_window.reshape(-1), 0))


def _read(trained: Trained, request: Request, held_out: HeldOut, cells: _Cells, number: int,
          groups: Groups) -> dict[str, np.ndarray]:
    """The sums of a batch of windows, in one pass over them and one over their parts for each length of context: of the
    cells that it has, and which these are."""
    device, batch = next(trained.model.parameters()).device, held_out.batches.batch(number)
    ids, targets, windows = batch.to(device)
    of_window = cells.of_window[np.minimum(windows.cpu().numpy(), cells.of_window.size - 1)]
    own, places_of = np.unique(of_window, return_inverse=True)
    sums, stride = _Sums(own.size, held_out.kinds, request.window), batch.tokenizer.stride
    losses, scored, first = _losses(trained, ids, targets)
    places = first + np.arange(losses.shape[1])
    kinds = np.zeros(losses.shape, np.int64)
    inside = places < ids.shape[1]
    kinds[:, inside] = held_out.kinds_of(batch).numpy()[:, places[inside]]
    _add(sums.kinds, losses, scored * stride, kinds, places_of)
    bins = np.broadcast_to(np.frexp(places)[1], losses.shape)  # so many bits has the number
    _add(sums.positions, losses, scored * stride, np.minimum(bins, sums.positions.shape[1] - 1), places_of)
    for context, of_context in sums.contexts.items():
        parts, of_parts = _parts(ids, context), _parts(targets, context)
        of_parts[:, : context // 2] = IGNORE
        losses, scored, _ = _losses(trained, parts, of_parts)
        _add(of_context, losses, scored * stride, np.zeros(losses.shape, np.int64),
             places_of.repeat(len(parts) // len(ids)))
    if groups.context.size > 1:
        for values in sums.all().values():
            values[...] = all_reduce(torch.from_numpy(values).to(device), groups.context).cpu().numpy()
    return {"cells": own, **sums.all()}


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
    trained.need_numbers(~losses.isnan().any())
    return losses.double().cpu().numpy(), (targets != IGNORE).double().cpu().numpy(), first


def _add(sums: np.ndarray, losses: np.ndarray, scored: np.ndarray, labels: np.ndarray, cells: np.ndarray) -> None:
    """Into [2, labels, cells]: values [B, l], their labels, and the cell of each row."""
    places = (labels * sums.shape[2] + cells[:, None]).reshape(-1)
    size = sums.shape[1] * sums.shape[2]
    for of_kind, values in zip(sums, (losses, scored), strict=True):
        of_kind += np.bincount(places, values.reshape(-1), minlength=size).reshape(of_kind.shape)


def _chains(pools: Sequence[Pool], request: Request, held_out: HeldOut, cell_of: np.ndarray, sums: _Sums,
            parts: Parts) -> dict[str, np.ndarray]:
    """By kind and by position, float64 [orders, 2, labels, cells]."""
    cells = sums.kinds.shape[2]

    def by_kind(number: int, interval: Interval, start: int, soft: np.ndarray) -> np.ndarray:
        windows, _, kinds = held_out.places(number, interval, start, soft)
        return kinds * cells + cell_of[windows]

    def by_position(number: int, interval: Interval, start: int, soft: np.ndarray) -> np.ndarray:
        windows, places, _ = held_out.places(number, interval, start, soft)
        return np.minimum(np.frexp(places)[1], sums.positions.shape[1] - 1) * cells + cell_of[windows]

    tables = chains_of(parts, "tables", pools)
    return {name: markov.score(tables, pools, request.split, labels=values[0].size, label=label,
                               tokenizer=held_out.tokenizer).reshape(-1, *values.shape)
            for name, values, label in (("kinds", sums.kinds, by_kind), ("positions", sums.positions, by_position))}


def chains_of(parts: Parts, name: str, pools: Sequence[Pool]) -> list[np.ndarray]:
    """`markov.fit` of the orders 0 to ORDERS, which is kept as a part."""
    found = parts.once(name, lambda: {f"order_{order}": table for order, table in
                                      enumerate(markov.fit(pools, ORDERS))})
    return [found[f"order_{order}"] for order in range(ORDERS + 1)]


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
        rows += row("context", _span(context // 2 + 1, context), values[:, 0], chains["positions"][:, :, last])
    for bits in range(sums.positions.shape[1]):
        name = _span(((1 << bits) >> 1) + 1, min(1 << bits, window))
        rows += row("position", name, sums.positions[:, bits], chains["positions"][:, :, bits])
    return rows


def _span(first: int, last: int) -> str:
    """The name of a row of these numbers of tokens."""
    return f"{first:,} to {last:,}" if first < last else f"{last:,}"


def _members(names: Sequence[Collection[str]]) -> list[tuple[str, np.ndarray]]:
    """Each name, and bool [n], which have it."""
    found = dict.fromkeys(name for of_one in names for name in of_one)
    return [(name, np.array([name in of_one for of_one in names])) for name in sorted(found, key=in_order)]


def _row(by: str, group: str, by_block: np.ndarray, blocks: Blocks) -> Row:
    """Of [blocks, 2 + orders]: the model's losses, the bases, and the losses of each chain."""
    total, drawn, holding = by_block.sum(0), blocks.sums(by_block), int(np.count_nonzero(by_block[:, 1]))
    best = 2 + int(total[2:].argmin())
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean, of_draws = np.exp(total[0] / total[1]), np.exp(drawn[:, 0] / drawn[:, 1])
        gain = (drawn[:, best] - drawn[:, 0]) / drawn[:, 1]
        chains = np.exp(total[2:] / total[1]).tolist()
    return Row(by, group, int(total[1]), float(mean), *blocks.interval(of_draws, holding), chains,
               float((total[best] - total[0]) / total[1]), *blocks.interval(gain, holding), holding)
