"""Where the training and validation windows come from."""

from dataclasses import dataclass
from typing import Any

from hyena_dist.config.sections.mixture import MixtureChange, MixtureSource, read_mixture, read_schedule
from hyena_dist.config.sections.ranges import not_negative, path, positive, seed_in_range

MOST_TEMPERATURE = 10
"""Beyond it all but the largest source are next to nothing."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where the windows come from. `shards` and `seed` are the identity of their order."""

    shards: str = "???"
    """Directory written by shards/build.py; `~` and $NAME are expanded. Of a mixture: the directory in which those of
    its sources are looked for."""
    mixture: Any = None
    """Sources to draw the training windows from in turn, each a mapping {name, shards, regions, weight}
    (`MixtureSource`); null: data.shards is the only one. Shares are exact to 1/16384, and at least that where a weight
    is not 0."""
    mixture_temperature: float | None = None
    """Instead of weights: a source's weight is the number of its training bases to this power. 1: by size; 0: all
    alike."""
    mixture_schedule: Any = None
    """Weights that hold from a step on, each change a mapping {step, weights} with a weight for every source
    (`MixtureChange`); null: those of data.mixture hold to the end."""
    cache: str = ""
    """A directory on a disk of the node: shards are copied there once, verified, and read from there by all ranks of
    the node; nothing in it is deleted. What does not fit is read from where it is, and that is said. Empty: no copies;
    `~` and $NAME are expanded."""
    cache_gb: float | None = None
    """Most gigabytes that everything in data.cache may have; null: what its disk has."""
    seq_len: int = 1024
    """Length L of a training window in tokens; inputs are [:L] and targets [1:] of L + 1 tokens. A token is a base,
    or of k-mers (model.kmer) several: L + 1 of those that stand side by side are k (L + 1) bases, of those that overlap
    L + k."""
    val_seq_len: int | None = None
    """Length and stride of the validation windows; null: seq_len."""
    val_tokens: int | None = None
    """Tokens of a validation: as many whole windows, at least one, at even distances over the validation split, always
    the same ones; null: all of the split."""
    rc_augment: bool = False
    """Show each training window, with probability 1/2, as its reverse complement, of which k-mers are made like of
    any other sequence."""
    pack: bool = False
    """Let contigs, and ends of contigs, that are too short for a window share one, in training and validation. Each
    learns and scores as if it were alone (`docs/short-contigs.md`); without it each has a window and padding."""
    lower_case_weight: float = 1.0
    """How much a soft-masked base (lower case: repeats, mostly) counts in the training loss, beside 1 of any other;
    the loss is divided by the sum of the weights. 0.1 is usual; 0: not at all. Validation counts all bases alike. A
    k-mer is soft-masked where its last base is."""
    num_workers: int = 1
    """Reader processes per rank; 0 reads in the training process. Never changes which windows come."""
    seed: int = 0
    """Seeds the order of the windows and their reverse complements."""

    def __post_init__(self) -> None:
        path("data", shards=self.shards)
        if self.cache:
            path("data", cache=self.cache)
        if self.cache_gb is not None:
            positive("data", cache_gb=self.cache_gb)
            if not self.cache:
                raise ValueError("data.cache_gb limits data.cache, which is empty: set it, or leave data.cache_gb out")
        positive("data", seq_len=self.seq_len)
        not_negative("data", num_workers=self.num_workers)
        seed_in_range("data", self.seed)
        not_negative("data", lower_case_weight=self.lower_case_weight)
        for key in ("val_seq_len", "val_tokens"):
            if getattr(self, key) is not None:
                positive("data", **{key: getattr(self, key)})
        self._check_mixture()

    def _check_mixture(self) -> None:
        if self.mixture_temperature is not None:
            not_negative("data", mixture_temperature=self.mixture_temperature)
            if self.mixture_temperature > MOST_TEMPERATURE:
                raise ValueError(f"data.mixture_temperature must be at most {MOST_TEMPERATURE}, got "
                                 f"{self.mixture_temperature}: at 1 sources are drawn by size")
        if self.mixture is None:
            for key in ("mixture_temperature", "mixture_schedule"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key} is of a mixture, and data.mixture is null: give its sources, or "
                                     f"leave data.{key} out")
        else:
            self.changes()

    def sources(self) -> list[MixtureSource]:
        """The entries of `mixture`; none without one."""
        return [] if self.mixture is None else read_mixture(self.mixture, self.mixture_temperature)

    def changes(self) -> list[MixtureChange]:
        """The entries of `mixture_schedule`; none without one."""
        names = [source.name for source in self.sources()]
        return [] if self.mixture_schedule is None else read_schedule(self.mixture_schedule, names)
