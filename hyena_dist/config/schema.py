"""Every key of a run, with its type, default and meaning.

One frozen dataclass per section; `Config` holds them all. OmegaConf refuses unknown keys and wrong types against these
classes (`load.py`); each `__post_init__` sees its own section only, and rules that span sections are in `checks.py`.
Nothing here touches disk, network, torch or a process group. Lengths are in tokens, one token per base.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

NUM_TOKENS = 12
"""Token ids of the published vocabulary; the data holds all but some special ones."""


VOCAB_MULTIPLE = 8
"""The published models pad the vocabulary to a multiple of this."""


MOST = 2**53
"""No whole number is greater: those up to it are exact in every format that a run writes."""


def _positive(section: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{section}.{key} must be greater than 0 and finite, got {value}")
        _not_beyond(section, key, value)


def _not_negative(section: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{section}.{key} must be 0 or greater and finite, got {value}")
        _not_beyond(section, key, value)


def _not_beyond(section: str, key: str, value: float) -> None:
    if isinstance(value, int) and value > MOST:
        raise ValueError(f"{section}.{key} must be at most 2**53, got {value}")


def _seed(section: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ValueError(f"{section}.seed must be at least 0 and less than 2**32, got {value}")


def _probability(section: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{section}.{key} must be at least 0 and less than 1, got {value}")


def _path(section: str, **values: str) -> None:
    for key, value in values.items():
        if not value.strip() or "\0" in value:
            raise ValueError(f"{section}.{key} must be a path, got {value!r}")


def _one_of(section: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{section}.{key} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The architecture; part of the model's identity, except for the dropout probabilities."""

    num_layers: int = 2
    """Blocks (mixer + MLP)."""
    hidden_size: int = 128
    """Channels D of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; null: 4 * hidden_size."""
    max_seq_len: int = 1024
    """Longest input the model takes. A longer one is an error, never cropped. `extend.py` makes it longer."""
    hyena_order: int = 2
    """Order N of the Hyena operator: N gates, N - 1 long convolutions."""
    filter_order: int = 64
    """Width of the implicit filter's trunk."""
    filter_emb_dim: int = 5
    """Positional features of the implicit filter: time and (filter_emb_dim - 1) / 2 complex bands."""
    filter_sine_freq: float = 10.0
    """Initial frequency of the filter's sine activations."""
    filter_num_inner_mlps: int = 2
    """Hidden layers of the filter's trunk after the first."""
    filter_shift: float = 0.05
    """Constant added to the decay window: 0.05 in the published inference code, 0.0 in the training code."""
    filter_seq_len: int | None = None
    """Length by which the filter's positions are normalised; null: max_seq_len. Part of the filter's meaning; lags
    past it go on along the same curve."""
    short_conv_kernel: int = 3
    """Taps of the depthwise causal convolution."""
    vocab_size: int = 12
    """Token ids; the embedding is padded to the next multiple of 8, as published."""
    embed_dropout: float = 0.1
    """Dropout on the embedding's output."""
    resid_dropout: float = 0.0
    """Dropout on the outputs of mixers and MLPs."""
    num_attention_heads: int = 1
    """Heads of attention layers ("A" in layer_pattern)."""
    layer_pattern: str = ""
    """Kinds of layers, repeated to num_layers: H Hyena, A attention; "" is all Hyena."""

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def __post_init__(self) -> None:
        _positive("model", num_layers=self.num_layers, hidden_size=self.hidden_size, max_seq_len=self.max_seq_len,
                  filter_order=self.filter_order, short_conv_kernel=self.short_conv_kernel,
                  vocab_size=self.vocab_size, num_attention_heads=self.num_attention_heads,
                  filter_sine_freq=self.filter_sine_freq)
        _not_negative("model", filter_num_inner_mlps=self.filter_num_inner_mlps, filter_shift=self.filter_shift)
        _probability("model", embed_dropout=self.embed_dropout, resid_dropout=self.resid_dropout)
        if self.vocab_size < NUM_TOKENS:
            raise ValueError(f"model.vocab_size must be at least {NUM_TOKENS}, the number of token ids, "
                             f"got {self.vocab_size}")
        _positive("model", hyena_order=self.hyena_order, filter_emb_dim=self.filter_emb_dim)
        if self.hyena_order < 2:
            raise ValueError(f"model.hyena_order must be 2 or greater, got {self.hyena_order}")
        if self.filter_emb_dim < 3 or self.filter_emb_dim % 2 == 0:
            raise ValueError(f"model.filter_emb_dim must be odd and at least 3 (time and complex bands), "
                             f"got {self.filter_emb_dim}")
        for key in ("ffn_hidden_size", "filter_seq_len"):
            value = getattr(self, key)
            if value is not None:
                _positive("model", **{key: value})
        if set(self.layer_pattern) - set("HA"):
            raise ValueError("model.layer_pattern may hold only H (Hyena) and A (attention), "
                             f"got {self.layer_pattern!r}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where the windows come from. `shards` and `seed` are the identity of their order."""

    shards: str = "???"
    """Directory written by shards/build.py; `~` and $NAME are expanded."""
    seq_len: int = 1024
    """Length L of a training window; inputs are [:L] and targets [1:] of L + 1 bases."""
    val_seq_len: int | None = None
    """Length and stride of the validation windows; null: seq_len."""
    rc_augment: bool = False
    """Show each training window, with probability 1/2, as its reverse complement."""
    num_workers: int = 1
    """Reader processes per rank; 0 reads in the training process. Never changes which windows come."""
    seed: int = 0
    """Seeds the order of the windows and their reverse complements."""

    def __post_init__(self) -> None:
        _path("data", shards=self.shards)
        _positive("data", seq_len=self.seq_len)
        _not_negative("data", num_workers=self.num_workers)
        _seed("data", self.seed)
        if self.val_seq_len is not None:
            _positive("data", val_seq_len=self.val_seq_len)


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
    eval_every: int = 200
    """Steps between validations; 0: only after the last step."""
    save_every: int = 200
    """Steps between checkpoints; 0: only after the last step."""
    on_nonfinite: str = "stop"
    """What to do when loss or gradients are not finite; such a step never changes the weights. stop: end the run; skip:
    go on with the next windows; rollback: go back to the last checkpoint, and pass over the windows since. An overflow
    of fp16 that lowers the loss scale is not meant."""
    profile_steps: int = 0
    """Steps to profile, after two of warm-up: a trace and a table of each rank in run_dir/profile; 0: none."""
    resume: str = "auto"
    """auto: the newest sound checkpoint of run_dir, or a fresh start where none was saved yet; none: a fresh start;
    else a checkpoint's path. One that is damaged is passed over for the one before it."""

    def __post_init__(self) -> None:
        _path("train", run_dir=self.run_dir, resume=self.resume)
        _positive("train", steps=self.steps, micro_batch_size=self.micro_batch_size,
                  global_batch_size=self.global_batch_size)
        _not_negative("train", eval_every=self.eval_every, save_every=self.save_every,
                      profile_steps=self.profile_steps)
        _one_of("train", "on_nonfinite", self.on_nonfinite, ("stop", "skip", "rollback"))
        _seed("train", self.seed)
        _one_of("train", "precision", self.precision, ("fp32", "bf16", "fp16"))
        _one_of("train", "activation_checkpointing", self.activation_checkpointing,
                ("none", "selective", "block", "full"))
        self._check_warmup()

    def _check_warmup(self) -> None:
        _one_of("train", "seq_len_warmup_batch", self.seq_len_warmup_batch, ("sequences", "tokens"))
        if isinstance(self.seq_len_warmup, list) and self.seq_len_warmup:
            for index, entry in enumerate(self.seq_len_warmup):
                WarmupStage.read(f"train.seq_len_warmup[{index}]", entry)
        elif self.seq_len_warmup not in ("none", "double"):
            raise ValueError("train.seq_len_warmup must be none, double or a list of stages like {seq_len: 64, "
                             f"steps: 100}}, got {self.seq_len_warmup!r}")
        if self.seq_len_warmup_steps is not None:
            _positive("train", seq_len_warmup_steps=self.seq_len_warmup_steps)
        if (self.seq_len_warmup == "double") != (self.seq_len_warmup_steps is not None):
            raise ValueError("train.seq_len_warmup_steps is the steps of each stage of train.seq_len_warmup=double: "
                             "set both or neither")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW with linear warm-up and cosine decay. As published, all but the filters' weights decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the last step; null: 0.1 * lr."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every weight outside the implicit filters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        _positive("optim", lr=self.lr, eps=self.eps)
        _not_negative("optim", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, grad_clip=self.grad_clip)
        _probability("optim", **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        if self.min_lr is not None:
            _not_negative("optim", min_lr=self.min_lr)
            if self.min_lr > self.lr:
                raise ValueError(f"optim.min_lr ({self.min_lr}) must not exceed optim.lr ({self.lr})")


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How one sequence and one model are split; what is left of the ranks is data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks: channels and vocabulary are split."""
    context: int = 1
    """Context-parallel ranks: tokens are split."""
    sequence: bool = False
    """Megatron's sequence parallelism: norms and residual stream split over the tensor ranks."""
    context_method: str = "auto"
    """How the long convolution crosses context ranks: auto, all_to_all or distributed_fft."""
    overlap_groups: int = 1
    """Channel groups that pipeline the exchange under the transform."""

    def __post_init__(self) -> None:
        _positive("parallel", tensor=self.tensor, context=self.context, overlap_groups=self.overlap_groups)
        _one_of("parallel", "context_method", self.context_method, ("auto", "all_to_all", "distributed_fft"))


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """Who owns gradients, optimizer state and their sharding."""

    name: str = "deepspeed"
    """deepspeed or fsdp."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3; FSDP always shards weights, gradients and optimizer state, as stage 3 does."""
    offload: str = "none"
    """What lives in the host's memory instead of the device's: none, optimizer (its state and step), or parameters
    (the weights too)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed through to DeepSpeed's configuration: its keys that tune or report (buckets, comms logger), as
    `engine/deepspeed_keys.py` lists them; others are refused."""

    def __post_init__(self) -> None:
        _one_of("engine", "name", self.name, ("deepspeed", "fsdp"))
        _one_of("engine", "offload", self.offload, ("none", "optimizer", "parameters"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")


@dataclass(frozen=True, kw_only=True)
class OpsSection:
    """Which code computes the operators; never changes what they mean."""

    backend: str = "auto"
    """Of the Hyena operator on one context rank, of norms, GELU and filters on any. torch; triton: kernels of the extra
    `kernels`, on CUDA, of the operator at order 2 and at most 8 taps, elsewhere torch, and the log says so; auto:
    triton where it was measured and checked, nowhere yet."""

    def __post_init__(self) -> None:
        _one_of("ops", "backend", self.backend, ("auto", "torch", "triton"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    ops: OpsSection = field(default_factory=OpsSection)
