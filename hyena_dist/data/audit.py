"""What shards hold and what they were made of, as `audit.json` beside them: of each assembly and split the bases, G
and C, N, lower case and other codes, of each assembly its contigs, and copies within and across splits.

The file says only what was read; nothing reads it to train, and it is no part of what identifies the shards.
"""

from collections.abc import Sequence
from typing import Any

from hyena_dist.data.census import Census
from hyena_dist.data.measure import CODES, Tally
from hyena_dist.data.sketch import WINDOW
from hyena_dist.data.splits import SPLITS

AUDIT = "audit.json"
FORMAT = "hyena-dist-audit"
VERSION = 1


def n50(lengths: Sequence[int]) -> int:
    """The length such that contigs of it or longer hold half of all bases."""
    half, held = sum(lengths) / 2, 0
    for length in sorted(lengths, reverse=True):
        held += length
        if held >= half:
            return length
    return 0


def _counts(tally: Tally) -> dict[str, Any]:
    other = sum(tally.codes)
    known = tally.bases - tally.unknown - other
    return {"bases": tally.bases, "gc_share": round(tally.strong / known, 6) if known else None, "n": tally.unknown,
            "lower_case": tally.lower,
            "other_codes": {code: count for code, count in zip(CODES, tally.codes, strict=True) if count}}


def audit(census: Census) -> dict[str, Any]:
    """The content of `audit.json`; after `census.check`."""
    lengths: dict[tuple[str, str], list[int]] = {}
    for info in census.contigs:
        lengths.setdefault((info.assembly, info.species), []).append(info.bases)
    assert census.copies is not None
    copies = census.copies
    return {
        "format": FORMAT,
        "version": VERSION,
        "assemblies": [
            {"assembly": origin[0], "species": origin[1], "contigs": len(lengths[origin]),
             "longest": max(lengths[origin]), "n50": n50(lengths[origin]), **_counts(tally)}
            for origin, tally in census.assemblies.items()],
        "splits": {split or "none": {**_counts(tally), "scored": tally.scored}
                   for split, tally in census.splits.items()},
        "copies": {"window_bases": WINDOW, "sampled_one_in": copies.one_in,
                   "splits": {split: {"windows": copies.windows[split], "again_in_split": copies.within[split],
                                      **({"also_train": copies.across[split]} if split != "train" else {})}
                              for split in SPLITS}},
    }
