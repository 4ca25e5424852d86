"""Does a model use distant sequence? Its loss, and its scores of variants, while what lies further away than a distance
is cropped, shuffled or masked.

A model that has learnt something of distant sequence gets worse when that is taken from it, and the distance beyond
which nothing changes is as far as it looks. What is shuffled keeps its pairs of neighbours (`data.shuffle`), so that
composition is no reason.

Some windows or variants, read in one way, are a part in OUT.parts: what is killed goes on where it was, and its numbers
are the same whatever the number of ranks that share the parts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.reference import Reference
from hyena_dist.data.shuffle import shuffled
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.data.tokenizer import BYTE_TO_ID, A, T
from hyena_dist.data.variants import Judged, Site, Variants, judge
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.observe import SCORES, score_sites
from hyena_dist.tasks.score.pieces import piece, read_pieces
from hyena_dist.tasks.score.read import TOKENS, read
from hyena_dist.tasks.score.tables import digest_of, facts_of, facts_of_shards
from hyena_dist.tasks.score.variants import Survey, survey
from hyena_dist.tasks.score.windows import ALLELES, STRANDS

UNKNOWN = BYTE_TO_ID[ord("N")]
WAYS = ("cropped", "shuffled", "masked")
TARGETS = 64
"""Bases at the end of a window that the loss is of, at most: a quarter of the window where that is less."""
LEAST = 8
"""The shortest distance, and the longest allele of a variant: whoever keeps so many bases keeps all of it."""
PART = 2**20
"""Tokens of a part at most, or one window: what a kill can cost."""


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


class _Piece(NamedTuple):
    """What is read for a part: the windows, or variants, [first, end), without what lies further than a distance."""

    of: str
    way: str
    distance: int
    first: int
    end: int


def prepare(trained: Trained, request: Request) -> tuple[dict[str, Any], list[Site]]:
    """Look at what there is before anything is read by the model.

    Returns:
        Everything that decides what is found, for the header, with what became of each row of the variants; and the
        variants that are read, none where none are asked for.

    Raises:
        UserError: unreadable shards or variants, or of another assembly; too few variants; a window that the model
            does not take.
    """
    if not 4 * LEAST <= request.window <= trained.seq_len:
        raise ConfigError(f"--window {request.window}: give {4 * LEAST} to the {trained.seq_len} bases that "
                          f"{trained.path} was trained on")
    facts = {**facts_of(trained), "tokens_of_a_batch": TOKENS[next(trained.model.parameters()).device.type],
             "tokens_of_a_part": PART, "window": request.window, **facts_of_shards(request.shards),
             "split": request.split, "most": request.most, "variants": ""}
    if request.variants is None or request.reference is None:
        return facts, []
    variants, reference = request.variants, request.reference
    found = survey_of(variants, reference, request.window, request.most)
    return facts | {"variants": variants.path.name, "variants_sha256": digest_of(variants.path, "--vcf or --table"),
                    "reference_sha256": reference.digest,
                    "assembly": reference.assembly or "not said by the reference",
                    "counts": {name: count for name, count in found.outcomes.items() if count},
                    "notes": found.notes}, found.sample


def score_distance(trained: Trained, request: Request, facts: Mapping[str, Any], sites: Sequence[Site], parts: Parts,
                   groups: Groups) -> list[Row]:
    """Take away by every way and distance. Collective.

    Args:
        facts: by `prepare`,
        sites: and these, too.
        parts: what an earlier call has left is gone on with.

    Returns:
        On the first rank the rows, on others none.

    Raises:
        UserError: unreadable shards, or without a whole window; parts of another call.
    """
    windows, targets = agree(lambda: held_out_windows(request), groups), min(TARGETS, request.window // 4)
    pieces = _pieces("loss", distances(request.window - targets), len(windows), request.window)
    if sites:
        pieces += _pieces("variants", distances(request.window // 2), len(sites), ALLELES * STRANDS * request.window)

    def values_of(number: int) -> dict[str, np.ndarray]:
        of, way, distance, first, end = pieces[number]
        if of == "variants" and request.reference is not None:
            return {"values": variant_scores(trained, sites[first:end], request.reference.ids, request.window, way,
                                             distance, first)}
        some, middle = list(windows[first:end]), request.window - targets
        if way != "whole":
            some = [take_away(ids, middle - distance, ids.size, way, (number, distance))[0]
                    for number, ids in enumerate(some, first)]
        return {"values": mean_losses(trained, some, targets)}
    read_pieces(parts, facts, len(pieces), values_of, groups, "windows by distance")
    is_first, longest = groups.world.rank == 0, request.window - targets
    return agree(lambda: _rows(pieces, sites, longest, parts) if is_first else [], groups)


def _pieces(of: str, kept: Sequence[int], count: int, tokens: int) -> list[_Piece]:
    """Of windows or variants, each of so many tokens."""
    step = max(1, PART // tokens)
    return [_Piece(of, way, distance, first, min(first + step, count))
            for way, distance in [("whole", 0), *((way, distance) for way in WAYS for distance in kept)]
            for first in range(0, count, step)]


def _rows(pieces: Sequence[_Piece], sites: Sequence[Site], longest: int, parts: Parts) -> list[Row]:
    """Join the parts.

    Args:
        longest: bases before the targets of a whole window.
    """
    found: dict[tuple[str, str, int], list[np.ndarray]] = {}
    for number, (of, way, distance, *_) in enumerate(pieces):
        found.setdefault((of, way, distance), []).append(piece(parts, number)["values"])
    values = {key: np.concatenate(some) for key, some in found.items()}
    whole = values["loss", "whole", 0]
    blocks, block_of = Blocks(whole.size), _blocks(sites)
    rows = []
    for (of, way, distance), each in values.items():
        if of == "loss":
            rows.append(_row(of, way, longest if way == "whole" else distance, each, whole, blocks))
        elif way != "whole":
            rows.append(_correlation(way, distance, each, values["variants", "whole", 0], block_of))
    return rows


def _blocks(sites: Sequence[Site]) -> np.ndarray:
    """int64 [n], at most 50 blocks of neighbours, which are alike."""
    order = sorted(range(len(sites)), key=lambda number: sites[number].at)
    block_of = np.empty(len(sites), np.int64)
    block_of[order] = np.arange(len(sites)) * min(len(sites), 50) // max(len(sites), 1)
    return block_of


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


def survey_of(variants: Variants, reference: Reference, window: int, most: int) -> Survey:
    """What became of each row, and a sample of at most so many variants with scores and alleles of at most LEAST bases.

    Raises:
        UserError: unreadable variants, or of another assembly, or fewer than three that can be compared.
    """
    found = survey(_without_long(judge(variants, reference, window)), reference, str(variants.path), most)
    if len(found.sample) < 3:
        raise ConfigError(f"{variants.path}: {found.scored} variants of at most {LEAST} bases can be scored"
                          f"{'' if found.scored < 3 else f', and --most {most} of them are read'}, too few to compare "
                          f"their order: give {'more variants' if found.scored < 3 else '--most 3 or more'}")
    return found


def _without_long(rows: Iterable[Judged]) -> Iterator[Judged]:
    """The same rows, where variants with a longer allele than the shortest distance are too long."""
    for judged in rows:
        site = judged.site
        if site is not None and max(site.removed, site.alt.size) > LEAST:
            judged = judged._replace(outcome="too_long", site=None, notes=())
        yield judged


@torch.no_grad()
def mean_losses(trained: Trained, sequences: Sequence[np.ndarray], targets: int) -> np.ndarray:
    """float64 [n], nats a base of the last so many bases of each sequence, all of one length. Collective over the
    model's context ranks, which get the same."""
    device = next(trained.model.parameters()).device
    size, found = max(1, TOKENS[device.type] // sequences[0].size), []
    for begin in range(0, len(sequences), size):
        ids = torch.from_numpy(np.stack(sequences[begin : begin + size])).to(device, torch.int64)
        reading = read(trained, ids)
        rows, end = torch.arange(len(ids), device=device), torch.full((len(ids),), ids.shape[1] - 1, device=device)
        losses = reading.total(reading.sums_before(end - targets, rows) - reading.sums_before(end, rows))
        found.append(losses.cpu().numpy())
    return np.concatenate(found) / targets


def _row(of: str, way: str, distance: int, values: np.ndarray, whole: np.ndarray, blocks: Blocks) -> Row:
    drawn = blocks.sums(np.stack([values, values - whole], -1)) / values.size
    value, change = blocks.interval(drawn[:, 0]), blocks.interval(drawn[:, 1])
    return Row(of, way, distance, values.size, float(values.mean()), *value, float((values - whole).mean()), *change)


def variant_scores(trained: Trained, sites: Sequence[Site], reference: np.ndarray, window: int, way: str,
                   distance: int, number: int = 0) -> np.ndarray:
    """float64 [n], llr_sum of each variant where only so many bases on each side of it are as they were. Each has a
    sequence of its own, of which `window_of` takes all. Collective over the model's context ranks, which get the same.

    Args:
        number: of the first variant, for the seeds of shuffles.
    """
    pieces, own, total = [], [], 0
    for place, site in enumerate(sites, number):
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
    return score_sites(trained, own, np.concatenate(pieces), window)[:, list(SCORES).index("llr_sum")]


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
