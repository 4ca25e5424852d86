"""Does a model use distant sequence? Its loss, and its scores of variants, while what lies further away than a distance
is cropped, shuffled or masked.

A model that has learnt something of distant sequence gets worse when that is taken from it, and the distance beyond
which nothing changes is as far as it looks. What is shuffled keeps its pairs of neighbours (`data.shuffle`), so that
composition is no reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.reference import Reference
from hyena_dist.data.shuffle import shuffled
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.data.tokenizer import BYTE_TO_ID, A, T
from hyena_dist.data.variants import Site, Variants, judge
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.observe import SCORES, score_sites
from hyena_dist.tasks.score.read import TOKENS, read
from hyena_dist.tasks.score.tables import bar

UNKNOWN = BYTE_TO_ID[ord("N")]
WAYS = ("cropped", "shuffled", "masked")
TARGETS = 64
"""Bases at the end of a window that the loss is of, at most: a quarter of the window where that is less."""
LEAST = 8
"""The shortest distance."""
_BYTES = 2**26
"""Of the windows of variants that are held at a time."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    shards: Path
    split: str
    window: int
    most: int
    """Windows, and variants, at most."""
    variants: Variants | None = None
    reference: Reference | None = None


@dataclass(frozen=True)
class Row:
    """One way to take away what is further than a distance; of variants or of held-out bases."""

    of: str
    """loss or variants"""
    way: str
    """whole where nothing is taken away"""
    distance: int
    """Bases that are kept: before the first target; of a variant on both sides."""
    count: int
    """Windows or variants."""
    value: float
    """The mean loss, nats a base; of variants Spearman's correlation of llr_sum with that of whole windows."""
    low: float
    high: float
    change: float
    """How much larger the loss is than that of whole windows; of variants the mean distance of llr_sum from it."""
    change_low: float
    change_high: float


def take_away(ids: np.ndarray, first: int, end: int, way: str, seed: Sequence[int]) -> tuple[np.ndarray, int]:
    """A sequence in which only bases [first, end) are as they were; and where they begin now.

    Args:
        ids: uint8 [n].
        way: one of WAYS.
        seed: of the shuffle.
    """
    first, end = max(first, 0), min(end, ids.size)
    if way == "cropped":
        return ids[first:end], 0
    found = ids.copy()
    random = np.random.default_rng([*seed])
    for part in (slice(0, first), slice(end, ids.size)):
        found[part] = UNKNOWN if way == "masked" else shuffled(ids[part], random)
    return found, first


def distances(longest: int) -> list[int]:
    """Powers of two below the longest distance there is."""
    return [1 << power for power in range(LEAST.bit_length() - 1, max(longest - 1, 1).bit_length())]


def score_distance(trained: Trained, request: Request, groups: Groups) -> list[Row]:
    """Take away by every way and distance. Collective.

    Raises:
        UserError: unreadable shards or variants, none of which is whole; a window that the model does not take.
    """
    if not 4 * LEAST <= request.window <= trained.seq_len:
        raise ConfigError(f"--window {request.window}: give {4 * LEAST} to the {trained.seq_len} bases that "
                          f"{trained.path} was trained on")
    windows = held_out_windows(request)
    targets = min(TARGETS, request.window // 4)
    kept = distances(request.window - targets)
    with bar("distances", groups) as shown:
        task = shown.add_task("", total=len(kept) * len(WAYS) * (1 if request.variants is None else 2) + 1)
        rows = _rows_of_losses(trained, windows, targets, kept, groups, lambda: shown.advance(task))
        if request.variants is not None and request.reference is not None:
            sites = variant_sites(request.variants, request.reference, request.window, request.most)
            rows += _rows_of_variants(trained, sites, request.reference.ids, request.window, groups,
                                      lambda: shown.advance(task))
    return rows


def held_out_windows(request: Request) -> np.ndarray:
    """uint8 [n, window]: whole windows without unknown bases, at even distances over the split."""
    found = []
    batches = ValidationBatches(Manifest.load(request.shards), split=request.split, seq_len=request.window,
                                batch_size=1, tokens=request.window * request.most)
    for batch in batches:
        ids = batch.ids[0, : request.window].numpy()
        if ((ids >= A) & (ids <= T)).all():
            found.append(ids)
    if not found:
        raise ConfigError(f"{request.shards}: split {request.split} has no window of {request.window:,} known bases: "
                          "give a shorter --window, or other shards")
    return np.stack(found)


def variant_sites(variants: Variants, reference: Reference, window: int, most: int) -> list[Site]:
    """Variants with scores, at most so many, at even distances over the file.

    Raises:
        ConfigError: there is none.
    """
    found = [judged.site for judged in judge(variants, reference, window)
             if judged.site is not None and max(judged.site.removed, judged.site.alt.size) <= LEAST]
    if len(found) < 3:
        raise ConfigError(f"{variants.path}: {len(found)} variants of at most {LEAST} bases lie on this reference, too "
                          "few to compare their order: give more, or the reference that they were made with")
    count = min(most, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def _rows_of_losses(trained: Trained, windows: np.ndarray, targets: int, kept: Sequence[int], groups: Groups,
                    on_step: Callable[[], None]) -> list[Row]:
    whole = mean_losses(trained, list(windows), targets, groups)
    blocks = Blocks(len(windows))
    rows = [_row("loss", "whole", windows.shape[1] - targets, whole, whole, blocks)]
    on_step()
    middle = windows.shape[1] - targets
    for way in WAYS:
        for distance in kept:
            changed = [take_away(ids, middle - distance, ids.size, way, (number, distance))[0]
                       for number, ids in enumerate(windows)]
            rows.append(_row("loss", way, distance, mean_losses(trained, changed, targets, groups), whole, blocks))
            on_step()
    return rows


@torch.no_grad()
def mean_losses(trained: Trained, sequences: Sequence[np.ndarray], targets: int, groups: Groups) -> np.ndarray:
    """float64 [n], nats a base of the last so many bases of each sequence, all of one length. Collective."""
    device = next(trained.model.parameters()).device
    size = max(1, TOKENS[device.type] // sequences[0].size)
    found = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    for number, begin in enumerate(range(0, len(sequences), size)):
        if number % groups.data.size != groups.data.rank:
            continue
        ids = torch.from_numpy(np.stack(sequences[begin : begin + size])).to(device, torch.int64)
        reading = read(trained, ids)
        rows, end = torch.arange(len(ids), device=device), torch.full((len(ids),), ids.shape[1] - 1, device=device)
        found[begin : begin + size] = reading.sums_before(end - targets, rows) - reading.sums_before(end, rows)
    if groups.data_context.size > 1:
        dist.all_reduce(found, group=groups.data_context.group)
    return found.cpu().numpy() / targets


def _row(of: str, way: str, distance: int, values: np.ndarray, whole: np.ndarray, blocks: Blocks) -> Row:
    drawn = blocks.sums(np.stack([values, values - whole], -1)) / values.size
    value, change = blocks.interval(drawn[:, 0]), blocks.interval(drawn[:, 1])
    return Row(of, way, distance, values.size, float(values.mean()), *value, float((values - whole).mean()), *change)


def _rows_of_variants(trained: Trained, sites: Sequence[Site], reference: np.ndarray, window: int, groups: Groups,
                      on_step: Callable[[], None]) -> list[Row]:
    def scores(way: str, distance: int) -> np.ndarray:
        return variant_scores(trained, sites, reference, window, way, distance, groups)
    whole, rows = scores("whole", window), []
    order = sorted(range(len(sites)), key=lambda number: sites[number].at)
    block_of = np.empty(len(sites), np.int64)
    block_of[order] = np.arange(len(sites)) * min(len(sites), 50) // len(sites)  # neighbours are alike
    for way in WAYS:
        for distance in distances(window // 2):
            rows.append(_correlation(way, distance, scores(way, distance), whole, block_of))
            on_step()
    return rows


def variant_scores(trained: Trained, sites: Sequence[Site], reference: np.ndarray, window: int, way: str,
                   distance: int, groups: Groups) -> np.ndarray:
    """float64 [n], llr_sum of each variant where only so many bases on each side of it are as they were. Each has a
    sequence of its own, of which `window_of` takes all. Collective."""
    device = next(trained.model.parameters()).device
    found, step = np.zeros(len(sites)), max(1, _BYTES // window)
    column = list(SCORES).index("llr_sum")
    for number, begin in enumerate(range(0, len(sites), step)):
        if number % groups.data.size != groups.data.rank:
            continue
        pieces, own, total = [], [], 0
        for place, site in enumerate(sites[begin : begin + step], begin):
            start = max(site.at - window // 2, site.begin)
            ids = reference[start : min(site.at - window // 2 + window + site.removed, site.end)]
            at = site.at - start
            if way != "whole":
                left, right = at - distance, at + max(site.removed, 1) + distance
                ids, first = take_away(ids, left, right, way, (place, distance))
                at += first - max(left, 0)
            pieces.append(ids)
            own.append(Site(total, total + ids.size, total + at, site.removed, site.alt))
            total += ids.size
        found[begin : begin + step] = score_sites(trained, own, np.concatenate(pieces), window)[:, column]
    if groups.data.size > 1:
        summed = torch.from_numpy(found).to(device)
        dist.all_reduce(summed, group=groups.data.group)
        found = summed.cpu().numpy()
    return found


def _correlation(way: str, distance: int, values: np.ndarray, whole: np.ndarray, block_of: np.ndarray) -> Row:
    """Spearman's correlation, and the mean distance, of two scores of variants."""
    from scipy.stats import rankdata

    x, y = rankdata(values), rankdata(whole)
    off = np.abs(values - whole)
    blocks = Blocks(int(block_of.max()) + 1)
    sums = np.stack([np.bincount(block_of, each) for each in (np.ones(x.size), x, y, x * x, y * y, x * y, off)], -1)
    drawn = blocks.sums(sums)
    value, change = blocks.interval(_pearson(drawn)), blocks.interval(drawn[:, 6] / drawn[:, 0])
    return Row("variants", way, distance, values.size, float(_pearson(sums.sum(0)[None])[0]), *value,
               float(off.mean()), *change)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Of [n, 6 or more]: counts, and sums of x, y, x x, y y and x y."""
    count, x, y, xx, yy, xy = sums[:, :6].T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (count * xy - x * y) / np.sqrt((count * xx - x * x) * (count * yy - y * y))


def as_values(row: Row) -> dict[str, object]:
    """By the names of the columns of a file; None where there is no number."""
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in vars(row).items()}


