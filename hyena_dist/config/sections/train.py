"""The run: its length, its batches, and when it validates and saves."""

from dataclasses import dataclass, fields
from typing import Any

from hyena_dist.config.sections.ranges import MOST, not_negative, one_of, path, positive, seed_in_range

WEIGHTS = "weights:"
"""Before a path in train.resume: its weights alone."""


@dataclass(frozen=True, kw_only=True)
class WarmupStage:
    """One entry of train.seq_len_warmup."""

    seq_len: int
    """Length of the stage's windows."""
    steps: int | None = None
    """Optimizer steps of the stage; this or tokens."""
    tokens: int | None = None
    """Tokens of the stage, rounded up to whole steps; this or steps."""
    micro_batch_size: int | None = None
    """Windows per rank and forward pass; null: as many as have no more tokens than a micro-batch of data.seq_len, of
    the numbers that divide the stage's batch."""

    @classmethod
    def read(cls, key: str, entry: Any) -> "WarmupStage":
        """An entry as it stands in the configuration, at `key`. OmegaConf has no type for a list or a word.

        Raises:
            ValueError: not a mapping, an unknown, missing or superfluous key, a value of another type or range.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{key} must be a stage like {{seq_len: 64, steps: 100}}, got {entry!r}")
        names = [stage_field.name for stage_field in fields(cls)]
        for name, value in entry.items():
            if name not in names:
                raise ValueError(f"{key}.{name} is not a key of a stage: use {', '.join(names)}")
            if value is not None and (type(value) is not int or not 0 < value <= MOST):
                raise ValueError(f"{key}.{name} must be a whole number greater than 0, at most 2**53, got {value!r}")
        if entry.get("seq_len") is None:
            raise ValueError(f"{key}.seq_len is missing: give the length of the stage's windows")
        if (entry.get("steps") is None) == (entry.get("tokens") is None):
            raise ValueError(f"{key} must have either steps or tokens, got {entry!r}")
        return cls(**entry)


_NO_PATHS = frozenset({"best", "last", "latest", "newest", "true", "false", "yes", "no", "on", "off"})
"""What people write for train.resume that is none of its words, and hardly ever a path."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The run: its length, batches, and when it validates and saves."""

    run_dir: str = "???"
    """Everything that a run writes is in here; `~` and $NAME are expanded."""
    seed: int = 0
    """Seeds the initial weights and dropout."""
    steps: int = 1000
    """Optimizer steps, those of the length warm-up included; the horizon of the learning rate."""
    micro_batch_size: int = 1
    """Windows per rank and forward pass."""
    global_batch_size: int = 1
    """Windows per optimizer step over all ranks; gradient accumulation follows from it."""
    seq_len_warmup: Any = "none"
    """Shorter sequences first. none; double: from 64, twice as long at each stage while below data.seq_len; or a list
    of stages {seq_len, steps or tokens, micro_batch_size if wanted} (`WarmupStage`). The rest of `steps` is at
    data.seq_len."""
    seq_len_warmup_steps: int | None = None
    """Optimizer steps of each stage of seq_len_warmup=double."""
    seq_len_warmup_batch: str = "sequences"
    """What the stages keep of a step at data.seq_len: sequences, its windows, as published; or tokens: a stage has
    data.seq_len // seq_len times as many windows."""
    precision: str = "fp32"
    """fp32, bf16 or fp16, by autocast; parameters, filter and FFT stay float32."""
    activation_checkpointing: str = "none"
    """What the backward pass recomputes. none; selective: what is wide and cheap (norms, projections inside a block,
    gates, short convolutions, activations, the filters' trunks); block: each block from its input; full: both, the
    least memory. Values and weight names are the same."""
    activation_offload: bool = False
    """Keep what the backward pass needs in the memory of the host instead of the device."""
    max_hours: float | None = None
    """Hours after which this start of the program has saved and ended, as by a signal: for where none comes before the
    time is up. It stops a tenth of them before, at most two minutes, or as long before as steps and saves need; null:
    no limit."""
    eval_every: int = 200
    """Steps between validations; 0: only after the last step."""
    patience: int = 0
    """Validations without a lower loss after which the run ends before its last step; 0: it never does."""
    save_every: int = 200
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: int = 2
    """Newest checkpoints that are kept, besides the best by validation loss and those of keep_every; at least 2, since
    the newest may be damaged, or of a run that is about to diverge."""
    keep_every: int = 0
    """Checkpoints at its multiples are never deleted, so that runs can be branched from them; a multiple of save_every.
    0: none is kept for that."""
    on_nonfinite: str = "stop"
    """What to do when loss or gradients are not finite; such a step never changes the weights. stop: end the run; skip:
    go on with the next windows; rollback: go back to the last checkpoint, and pass over the windows since. An overflow
    of fp16 that lowers the loss scale is not meant."""
    profile_steps: int = 0
    """Steps to profile, after two of warm-up: a trace and a table of each rank in run_dir/profile; 0: none."""
    wandb: str = ""
    """Weights & Biases: the project that the rows are sent to as well, by its library (`pip install
    'hyena-dist[wandb]'`); empty: none."""
    resume: str = "auto"
    """auto: the newest sound checkpoint of run_dir, or a fresh start where none was saved yet; none: a fresh start. The
    path of a checkpoint, or of a run for its newest one: in a new run_dir a branch, which goes on with all of its state
    (weights, moments, place in the data); weights:PATH takes its weights alone and starts at step 0. The same command
    again goes on with the branch. A checkpoint that is damaged is passed over for the one before it."""

    @property
    def origin(self) -> str | None:
        """The path in `resume`, if there is one."""
        return None if self.resume in ("auto", "none") else self.resume.removeprefix(WEIGHTS)

    @property
    def weights_only(self) -> bool:
        """Whether only the weights are taken from `origin`."""
        return self.resume.startswith(WEIGHTS)

    def __post_init__(self) -> None:
        path("train", run_dir=self.run_dir, resume=self.resume.removeprefix(WEIGHTS))
        if self.resume.lower() in _NO_PATHS:
            raise ValueError(f"train.resume must be auto (the newest checkpoint of train.run_dir), none, the path of a "
                             f"checkpoint or a run, or weights:PATH, got {self.resume!r}; a path of that name is "
                             f"./{self.resume}")
        positive("train", steps=self.steps, micro_batch_size=self.micro_batch_size,
                  global_batch_size=self.global_batch_size)
        if self.max_hours is not None:
            positive("train", max_hours=self.max_hours)
        not_negative("train", eval_every=self.eval_every, save_every=self.save_every, patience=self.patience,
                      profile_steps=self.profile_steps)
        self._check_kept()
        one_of("train", "on_nonfinite", self.on_nonfinite, ("stop", "skip", "rollback"))
        seed_in_range("train", self.seed)
        one_of("train", "precision", self.precision, ("fp32", "bf16", "fp16"))
        one_of("train", "activation_checkpointing", self.activation_checkpointing,
                ("none", "selective", "block", "full"))
        self._check_warmup()

    def _check_kept(self) -> None:
        if self.keep_last < 2:
            raise ValueError(f"train.keep_last must be at least 2, got {self.keep_last}: where the newest checkpoint "
                             "is damaged a run goes on from the one before")
        not_negative("train", keep_last=self.keep_last, keep_every=self.keep_every)
        if self.keep_every and not self.save_every:
            raise ValueError(f"train.keep_every ({self.keep_every}) keeps nothing with train.save_every=0: set it, too")
        if self.keep_every and self.keep_every % self.save_every:
            raise ValueError(f"train.keep_every ({self.keep_every}) is not a multiple of train.save_every "
                             f"({self.save_every}), so most of its steps are not saved: use "
                             f"{-(-self.keep_every // self.save_every) * self.save_every}")

    def _check_warmup(self) -> None:
        one_of("train", "seq_len_warmup_batch", self.seq_len_warmup_batch, ("sequences", "tokens"))
        if isinstance(self.seq_len_warmup, list) and self.seq_len_warmup:
            for index, entry in enumerate(self.seq_len_warmup):
                WarmupStage.read(f"train.seq_len_warmup[{index}]", entry)
        elif self.seq_len_warmup not in ("none", "double"):
            raise ValueError("train.seq_len_warmup must be none, double or a list of stages like {seq_len: 64, "
                             f"steps: 100}}, got {self.seq_len_warmup!r}")
        if self.seq_len_warmup_steps is not None:
            positive("train", seq_len_warmup_steps=self.seq_len_warmup_steps)
        if (self.seq_len_warmup == "double") != (self.seq_len_warmup_steps is not None):
            raise ValueError("train.seq_len_warmup_steps is the steps of each stage of train.seq_len_warmup=double: "
                             "set both or neither")
