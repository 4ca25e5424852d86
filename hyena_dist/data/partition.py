"""How labelled sequences are parted: a random part for validation, and what stands in two parts that should be
apart."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hyena_dist.data.bed import Span, merged, overlap
from hyena_dist.data.errors import DataError
from hyena_dist.data.homology import Region, alike, read_regions
from hyena_dist.data.tables import Cut, Example

_PAIRS = (("train", "test"), ("valid", "test"), ("train", "valid"))
"""Splits that should be apart."""


def copy_key(*, both_strands: bool) -> Callable[[Example], bytes]:
    """What copies of a sequence have in common. To a model that reads both strands the reverse complement is one."""
    return lambda example: example.key_of_either_strand if both_strands else example.key


def move_chromosomes(splits: dict[str, list[Example]], name: str, listed: Collection[str]) -> None:
    """Take the intervals of these chromosomes out of training, for another split.

    Raises:
        DataError: that has sequences already, or there are none on a chromosome.
    """
    if splits[name]:
        raise DataError(f"finetune.{name}_chromosomes: the tables say already which sequences are of {name}: leave it "
                        "out")
    known = {example.chromosome for example in splits["train"]}
    for chromosome in listed:
        if chromosome not in known:
            raise DataError(f"finetune.{name}_chromosomes: no training sequence is of {chromosome!r}: there are "
                            f"{', '.join(sorted(filter(None, known)))[:200] or 'no intervals'}")
    splits[name] = [example for example in splits["train"] if example.chromosome in listed]
    splits["train"] = [example for example in splits["train"] if example.chromosome not in listed]


def draw(examples: Sequence[Example], fraction: float, seed: int, *, same: Callable[[Example], bytes],
         classes: Callable[[Example], Collection[str]]) -> tuple[list[Example], list[Example]]:
    """The sequences that are left to train on, and a random part for validation.

    Copies of one sequence stay together, so that none is on both sides. Of each class at least one sequence is left,
    with its copies: a class that is never trained on could not be validated.

    Args:
        fraction: of the sequences, which the part has at least unless too few can be spared.
        same: a key that copies share.
        classes: those of a sequence; none where labels are numbers.
    """
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(same(example), []).append(number)
    members = list(groups.values())
    # Sequences without a class count as one class of their own: one of them is left, too.
    of_group = [{name for number in group for name in classes(examples[number]) or ("",)} for group in members]
    left = Counter(name for names in of_group for name in names)
    wanted, drawn = max(1, round(fraction * len(examples))), set[int]()
    for group in np.random.default_rng([seed, 0x7661]).permutation(len(members)):
        if len(drawn) >= wanted:
            break
        if any(left[name] == 1 for name in of_group[group]):
            continue
        left.subtract(of_group[group])
        drawn.update(members[group])
    return ([example for number, example in enumerate(examples) if number not in drawn],
            [example for number, example in enumerate(examples) if number in drawn])


def homologous(path: Path, examples: Iterable[Example]) -> list[Region]:
    """The regions of a file of homologies that are on the contigs of intervals.

    Raises:
        DataError: it cannot be read, is of other contigs, or a region reaches past the end of its contig.
    """
    lengths = {example.chromosome: len(example.held.contig) for example in examples if isinstance(example.held, Cut)}
    regions = read_regions(path)
    found = [region for region in regions if region.contig in lengths]
    if not found:
        raise DataError(f"{path}: line {regions[0].line}: contig {regions[0].contig!r}, as all others in it, has no "
                        f"interval in finetune.table, which has {', '.join(sorted(lengths))[:200]}: check the names "
                        "(chr1 or 1?)")
    for region in found:
        if region.end > lengths[region.contig]:
            raise DataError(f"{path}: line {region.line}: region {region.contig}:{region.start}-{region.end} reaches "
                            f"past the {lengths[region.contig]:,} bases of its contig in finetune.genome; is this of "
                            "another assembly?")
    return found


def without_alike(splits: Mapping[str, list[Example]], path: Path,
                  regions: Sequence[Region]) -> tuple[list[Example], str]:
    """The training intervals that are outside of every region alike to validation or test, and a note on the others.

    Args:
        path: where the regions are from, for messages.
        regions: as `homologous` gives them.

    Raises:
        DataError: none is left.
    """
    train = splits["train"]
    apart, families = alike(regions, spans_of([*splits["valid"], *splits["test"]]))
    kept = [example for example, (contig, place) in zip(train, _places(train), strict=True)
            if not overlap(*place, apart.get(contig, []))]
    if train and not kept:
        raise DataError(f"{path}: all {len(train):,} training intervals are alike to validation or test: hold out "
                        "fewer, or whole families")
    return kept, (f"{path}: {len(train) - len(kept):,} of {len(train):,} training intervals do not train, as they are "
                  f"alike to validation or test ({families:,} families)")


def repeated(splits: Mapping[str, Sequence[Example]], *, both_strands: bool) -> list[str]:
    """A note for each two splits that share sequences."""
    same = copy_key(both_strands=both_strands)
    sets = {name: {same(example) for example in examples} for name, examples in splits.items()}
    how = ", on this strand or the other" * both_strands
    return [f"{count:,} different sequences are in {one} and in {other}{how}: what is found there is too good"
            for one, other in _PAIRS if one in sets and other in sets and (count := len(sets[one] & sets[other]))]


def overlapping(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """A note for each two splits of which intervals overlap, on either strand."""
    spans, notes = {name: spans_of(examples) for name, examples in splits.items()}, []
    for one, other in _PAIRS:
        found = [bool(overlap(*place, spans.get(one, {}).get(contig, [])))
                 for contig, place in _places(splits.get(other, ()))]
        if count := sum(found):
            notes.append(f"{count:,} of the {len(found):,} intervals of {other} overlap intervals of {one}: what is "
                         "found there may be too good; hold out whole chromosomes")
    return notes


def spans_of(examples: Iterable[Example]) -> dict[str, list[Span]]:
    """The merged stretches of each contig that intervals cover."""
    found: dict[str, list[Span]] = {}
    for contig, place in _places(examples):
        found.setdefault(contig, []).append(place)
    return {contig: merged(spans) for contig, spans in found.items()}


def _places(examples: Iterable[Example]) -> list[tuple[str, Span]]:
    """Contig and place of each interval."""
    return [(example.chromosome, (example.held.start, example.held.end)) for example in examples
            if isinstance(example.held, Cut)]


def contradicting(examples: Sequence[Example], same: Callable[[Example], bytes],
                  label: Callable[[Example], Hashable]) -> list[str]:
    """A note on sequences that come several times, with different labels.

    Args:
        same: a key that copies share.
        label: what is equal of labels that say the same.
    """
    keys = [same(example) for example in examples]
    count = Counter(keys)
    labels: dict[bytes, set[Hashable]] = {}
    for key, example in zip(keys, examples, strict=True):
        if count[key] > 1:
            labels.setdefault(key, set()).add(label(example))
    odd = sum(len(found) > 1 for found in labels.values())
    return [f"{odd:,} different sequences come more than once, with different labels: no answer is right for all of "
            "these"] * bool(odd)
