"""Where the training and validation windows come from."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import not_negative, path, positive, seed_in_range


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where the windows come from. `shards` and `seed` are the identity of their order."""

    shards: str = "???"
    """Directory written by shards/build.py; `~` and $NAME are expanded."""
    seq_len: int = 1024
    """Length L of a training window; inputs are [:L] and targets [1:] of L + 1 bases."""
    val_seq_len: int | None = None
    """Length and stride of the validation windows; null: seq_len."""
    val_tokens: int | None = None
    """Tokens of a validation: as many whole windows, at least one, at even distances over the validation split, always
    the same ones; null: all of the split."""
    rc_augment: bool = False
    """Show each training window, with probability 1/2, as its reverse complement."""
    num_workers: int = 1
    """Reader processes per rank; 0 reads in the training process. Never changes which windows come."""
    seed: int = 0
    """Seeds the order of the windows and their reverse complements."""

    def __post_init__(self) -> None:
        path("data", shards=self.shards)
        positive("data", seq_len=self.seq_len)
        not_negative("data", num_workers=self.num_workers)
        seed_in_range("data", self.seed)
        for key in ("val_seq_len", "val_tokens"):
            if getattr(self, key) is not None:
                positive("data", **{key: getattr(self, key)})
