"""The numbers that a needle table (`tasks.needle`) is made of; without numpy, so that --help is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NeedleSize:
    """The kind of table.

    Raises:
        ValueError: sequences are too short for what is to be in them.
    """

    length: int = 8192
    slices: int = 4
    motif: int = 32
    """Bases of a motif. Both are the same at every length: they follow from the seed alone."""
    mismatches: int = 4
    """Bases in which a distractor differs from its motif."""
    distractors: int = 4
    """Of either motif in each sequence."""
    copies: int = 1
    """Motifs in a training sequence, from 1 to this, small numbers more often; in the other splits always 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.length, self.motif, self.mismatches, self.copies) < 1 or self.slices < 2 or self.distractors < 0:
            raise ValueError("every number must be at least 1, slices at least 2")
        if self.mismatches > self.motif:
            raise ValueError(f"a motif of {self.motif} bases has no {self.mismatches} mismatches")
        if self.length % self.slices or self.length // self.slices < 2 * self.motif:
            raise ValueError(f"a length of {self.length} is no {self.slices} slices of at least two motifs")
        # At most half full, places that are drawn one by one do not run out.
        if 2 * (2 * self.distractors + self.copies) > self.length // self.motif:
            raise ValueError(f"{self.length} bases have no room for {self.copies} motifs and {2 * self.distractors} "
                             "distractors")
