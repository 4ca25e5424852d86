"""Scores of the variants of a file: by any number of ranks, killed and resumed at will, the same file byte for byte.

The variants that can be scored are cut into chunks, which the ranks do in turn. The scores of each are a file in
OUT.parts, which is whole or not there; when all are there, the first rank joins them with the rows.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.data.reference import Reference
from hyena_dist.data.variants import OUTCOMES, Judged, Site, Variants, judge, window_of
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, agree_where_shared, broadcast
from hyena_dist.runtime.files import write_durably, write_whole
from hyena_dist.runtime.memory import peak_memory_bytes
from hyena_dist.tasks.parts import ANOTHER, Parts, names
from hyena_dist.tasks.score.numerics import CARD, Card, NumericsError, measure
from hyena_dist.tasks.score.observe import SCORES, score_sites
from hyena_dist.tasks.score.output import Scored, check_ending, left_out, write
from hyena_dist.tasks.score.read import TOKENS
from hyena_dist.tasks.score.tables import bar, facts_of

CHUNK = 256
"""Variants of a part at most, or a few more: what a kill can cost."""
_PARTS = 64
"""So many parts are made of fewer variants, that many ranks have as much to do each,"""
_LEAST = 64
"""of at least so many variants."""
_SHORTEST = 4
"""Bases of a window. A variant is in its middle, and an allele has less than half of it."""
_HELD = 128
"""Parts that are held while the file is written."""
_FIRST = 100
"""Variants by which a wrong assembly is known,"""
_FIT = 0.9
"""of which so many fit the right one; of another about a third does."""
_ALLELES = "give variants of which both alleles are written in bases"
_REFERENCE = "give the reference that it was made with"
_REMEDIES = {
    "malformed": "write places as whole numbers from 1 on and alleles in letters of bases, and name other columns "
                 "otherwise",
    "unknown_contig": f"{_REFERENCE}, or chromosomes by its names",
    "unknown_base": "give variants whose alleles have A, C, G and T alone",
    "no_alternative": _ALLELES, "star": _ALLELES, "symbolic": _ALLELES, "breakend": _ALLELES,
    "contig_end": "give a reference with more of the sequence around them",
    "too_long": "give a longer --window, or shorter variants",
    "ref_mismatch": _REFERENCE, "outside": _REFERENCE,
}
"""What to do where no variant has scores, by what is the matter with the most of them."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    variants: Variants
    reference: Reference
    out: Path
    window: int
    reference_name: str
    """Of the file, for the header."""
    accept_numerics: bool = False


@dataclass(frozen=True)
class Survey:
    """What is in a file, seen before anything is scored."""

    outcomes: dict[str, int]
    notes: dict[str, int]
    digest: str
    """sha256 of the rows."""
    sample: list[Site]
    """Some of the variants with scores, each as likely to be drawn."""

    @property
    def scored(self) -> int:
        return self.outcomes["scored"]


@dataclass(frozen=True)
class Result:
    """What was done."""

    survey: Survey
    card: Card
    seconds: float
    """Of this call, for scoring."""
    scored_now: int
    """Variants that this rank scored in this call."""


def survey(variants: Iterable[Judged], reference: Reference, where: str, most: int = CARD) -> Survey:
    """Count the outcomes, draw a sample, and refuse variants of another assembly.

    Args:
        reference: by which the variants are judged.
        where: the file, for messages.
        most: variants of the sample, by default as many as the numerics card has.

    Raises:
        ConfigError: of the first hundred variants that lie on the reference too few have its bases, or there are rows
            and none can be scored.
    """
    outcomes, notes, unknown = Counter(dict.fromkeys(OUTCOMES, 0)), Counter[str](), Counter[str]()
    digest, random, sample = sha256(), np.random.default_rng(0), list[Site]()
    placed = fits = 0
    for judged in variants:
        row = judged.row
        outcomes[judged.outcome] += 1
        notes.update(judged.notes)
        unknown.update([row.chrom] if judged.outcome == "unknown_contig" else [])
        digest.update("\t".join([row.chrom, row.pos, row.ref, row.alt, *row.others]).encode() + b"\n")
        digest.update(row.raw)
        if placed < _FIRST and judged.outcome in ("scored", "ref_mismatch"):
            placed, fits = placed + 1, fits + (judged.outcome == "scored")
            if placed == _FIRST:
                _check_assembly(placed, fits, where)
        if judged.site is not None:
            number = outcomes["scored"]
            place = number - 1 if number <= most else int(random.integers(number))
            if place < most:
                sample[place : place + 1] = [judged.site]
    if placed >= _FIRST // 5:
        _check_assembly(placed, fits, where)
    if outcomes.total() and not outcomes["scored"]:
        found = ", ".join(f"{count:,} {name}" for name, count in outcomes.items() if count)
        commonest = max(outcomes, key=outcomes.__getitem__)
        named = f"; {reference.against(unknown)}" if unknown else ""
        raise ConfigError(f"{where}: no variant can be scored on this reference ({found}{named}): "
                          f"{_REMEDIES[commonest]}")
    return Survey(dict(outcomes), dict(sorted(notes.items())), digest.hexdigest(), sample)


def _check_assembly(placed: int, fits: int, where: str) -> None:
    if fits < _FIT * placed:
        raise ConfigError(f"{where}: of the first {placed} variants on this reference REF fits its bases in "
                          f"{fits / placed:.0%}, so that it is of another assembly: give the reference that the "
                          "variants were called on")


def score_variants(trained: Trained, request: Request, groups: Groups) -> Result:
    """Score the variants of a file and write them to `request.out`. Collective.

    Raises:
        UserError: unreadable variants, or of another assembly; a window that the model does not take; the file exists;
            parts of another call lie beside it.
        NumericsError: the precision changes the order of the variants.
    """
    found = agree(lambda: _prepare(trained, request), groups)
    card = agree(lambda: measure(trained, found.sample, request.reference.ids, request.window,
                                 accept=request.accept_numerics), groups)
    facts, parts = _facts(trained, request, found, card), Parts(request.out)
    parts.begin(facts, groups)
    there = broadcast(_parts_there(request, found, parts) if groups.world.rank == 0 else frozenset(), groups)
    start = time.monotonic()
    scored = agree_where_shared(lambda: _score_chunks(trained, request, found, parts, there, groups), groups)
    seconds = time.monotonic() - start
    agree(lambda: _finish(request, parts, facts, found, trained, seconds, scored) if groups.world.rank == 0 else None,
          groups)
    return Result(found, card, seconds, scored)


def _judged(request: Request) -> Iterator[Judged]:
    return judge(request.variants, request.reference, request.window)


def _prepare(trained: Trained, request: Request) -> Survey:
    if request.window > trained.seq_len:
        raise ConfigError(f"--window {request.window}: {trained.path} was trained on sequences of {trained.seq_len} "
                          f"bases, and says nothing sensible of longer ones: give {_SHORTEST} to {trained.seq_len}")
    if request.window < _SHORTEST:
        raise ConfigError(f"--window {request.window}: is too short for a variant and a base on each side of it: give "
                          f"{_SHORTEST} to {trained.seq_len}")
    check_ending(request.out, request.variants)
    Parts(request.out).check_outputs({"--out": request.out})
    return survey(_judged(request), request.reference, str(request.variants.path))


def _facts(trained: Trained, request: Request, found: Survey, card: Card) -> dict[str, Any]:
    """The file's header: everything that decides what is in it, and nothing that changes from call to call."""
    device = next(trained.model.parameters()).device.type
    reference = request.reference
    return {**facts_of(trained), "tokens_of_a_batch": TOKENS[device], "window": request.window,
            "strands": "mean of both", "variants": request.variants.path.name, "variants_sha256": found.digest,
            "reference": request.reference_name, "reference_sha256": reference.digest,
            "assembly": reference.assembly or "not said by the reference",
            "filters": "a variant that comes again is scored once, and each of its rows has the scores",
            "counts": {name: count for name, count in found.outcomes.items() if count}, "notes": found.notes,
            **left_out(request.out, request.variants), "numerics": card.facts()}


def _read_part(parts: Parts, number: int, count: int) -> np.ndarray | None:
    """The scores of a chunk; None: they are not there, or not whole."""
    part = parts.load(names([number]))
    return part["scores"] if part is not None and part["scores"].shape == (count, len(SCORES)) else None


def _parts_there(request: Request, found: Survey, parts: Parts) -> frozenset[int]:
    """Numbers of the parts that a call before has left whole."""
    if not parts.has_any:
        return frozenset()
    return frozenset(number for number, chunk in enumerate(_chunks(request, found))
                     if _read_part(parts, number, len(chunk)) is not None)


def _score_chunks(trained: Trained, request: Request, found: Survey, parts: Parts, there: Collection[int],
                  groups: Groups) -> int:
    """Score this rank's chunks that are not there yet; returns how many variants. Ranks that share their windows have
    the same chunks, which the first of them writes."""
    data, done = groups.data, 0
    with bar("variants", groups) as shown:
        task = shown.add_task("", total=found.scored)
        for number, chunk in enumerate(_chunks(request, found)):
            if number % data.size == data.rank and number not in there:
                scores = _score_chunk(trained, chunk, request)
                if groups.context.rank == 0:
                    parts.save(names([number]), scores=scores)
                done += len(chunk)
            shown.advance(task, len(chunk))
    return done


def _chunks(request: Request, found: Survey) -> Iterator[list[Site]]:
    """The variants that have scores, in parts. Neighbours that share a reference window are in the same one, so that
    the window is scored once, unless that made a part twice as large."""
    size = min(CHUNK, max(_LEAST, -(-found.scored // _PARTS)))
    chunk: list[Site] = []
    for judged in _judged(request):
        if judged.site is None:
            continue
        if len(chunk) >= size and (len(chunk) >= 2 * size or window_of(judged.site, request.window)
                                   != window_of(chunk[-1], request.window)):
            yield chunk
            chunk = []
        chunk.append(judged.site)
    if chunk:
        yield chunk


def _score_chunk(trained: Trained, chunk: list[Site], request: Request) -> np.ndarray:
    try:
        return score_sites(trained, chunk, request.reference.ids, request.window)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"windows of --window {request.window} do not fit into the free memory: free some, or give "
                          "shorter ones") from error


def _finish(request: Request, parts: Parts, facts: dict[str, Any], found: Survey, trained: Trained, seconds: float,
            scored: int) -> None:
    """Join the parts with the rows; the scores are in the file before their parts go."""
    write_whole(request.out, lambda aside: write(aside, request.out.name, _rows(request, parts, found),
                                                 request.variants, facts, request.window), ANOTHER)
    cost = {"seconds_per_variant": seconds / scored if scored else None, "variants_scored_by_rank_0": scored,
            "peak_memory_bytes": peak_memory_bytes(next(trained.model.parameters()).device)}
    write_whole(cost_path(request.out), lambda aside: write_durably(aside, json.dumps(cost, indent=1) + "\n"), ANOTHER)
    parts.remove()


def cost_path(out: Path) -> Path:
    """Where the time and the memory of a file of scores stand: beside it, for they are not the same twice."""
    return out.with_name(f"{out.name}.cost.json")


def _rows(request: Request, parts: Parts, found: Survey) -> Iterator[Scored]:
    """Each row with the scores of its variant, which may be in a part that many rows before it have had."""
    firsts = np.cumsum([0, *(len(chunk) for chunk in _chunks(request, found))])
    scores_of = lru_cache(_HELD)(lambda part: parts.need(names([part]))["scores"])
    for judged in _judged(request):
        if judged.number is None:
            yield Scored(judged, None)
            continue
        if not judged.number < firsts[-1] == found.scored:
            raise ConfigError(f"{request.variants.path}: has changed while it was scored: start again")
        part = int(np.searchsorted(firsts, judged.number, side="right")) - 1
        yield Scored(judged, scores_of(part)[judged.number - firsts[part]])


__all__ = ["NumericsError", "Request", "Result", "Survey", "score_variants", "survey"]
