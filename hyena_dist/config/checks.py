"""Rules that span sections of the configuration. Pure: no disk, network, torch or process group.

`check` collects every violation and raises once, so that a user mends a configuration in one go. What the kinds of
mixers refuse stands with them, in `model.kinds`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from hyena_dist.config.advice import TRIED, Misfit, Problem, refuse
from hyena_dist.config.context import deals_out, exchanged_rows
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import VOCAB_MULTIPLE, ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.warmup import Stage, stages


@dataclass(frozen=True)
class Use:
    """What a model is asked to do, as far as a kind of mixer may refuse it."""

    model: ModelSection
    parallel: ParallelSection
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Lengths of whole sequences, by the key that each stands at; none where only a model is built."""
    batches: Mapping[str, int] = field(default_factory=dict)
    """Sizes of micro-batches, by the key that each stands at; none where only a model is built."""
    packed: bool = False
    """Whether several sequences come in a row (data.pack), which it has to keep apart."""


MixerRule = Callable[[Use], Iterable[Problem]]


def check(config: Config, *, world_size: int, mixers: Iterable[MixerRule]) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Args:
        mixers: the rules of the kinds of mixers. They are known where these are: call `model.kinds.check`, which
            gives them.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    refuse(partial(problems, tuple(mixers)), config, world_size)


def problems(mixers: Sequence[MixerRule], config: Config, world_size: int) -> list[Problem]:
    """Every violation, without advice, which takes longer to find."""
    use = _use(config, world_size)
    return [*_engine(config), *_lengths(config), *_batch(mixers, config, world_size), *_schedule(config),
            *_warmup(config, world_size), *_tensor(config), *(problem for rule in mixers for problem in rule(use))]


def _use(config: Config, world_size: int) -> Use:
    """What the run's model is asked to do: every length and micro-batch of the run."""
    warmup = _warmup_stages(config, world_size)
    lengths = {"data.seq_len": config.data.seq_len, "data.val_seq_len": config.data.val_seq_len,
               **{f"{name}: seq_len": stage.seq_len for name, stage in warmup}}
    batches = {**{f"{name}: micro_batch_size": stage.micro_batch_size for name, stage in warmup},
               "train.micro_batch_size": config.train.micro_batch_size}
    return Use(config.model, config.parallel, {key: length for key, length in lengths.items() if length is not None},
               batches, packed=config.data.pack)


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, data_ranks: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises:
        ConfigError: the global batch is not a multiple of micro batch x data ranks; names the nearest that is.
    """
    unit = micro_batch_size * data_ranks
    if global_batch_size % unit:
        raise ConfigError(_not_a_multiple("train.global_batch_size", global_batch_size, unit,
                                          f"train.micro_batch_size {micro_batch_size} x {data_ranks} data ranks"))
    return global_batch_size // unit


def cooldown_steps(optim: OptimSection, steps: int) -> int:
    """Steps of the cool-down that ends a run of `steps` steps with optim.schedule=wsd; at least 1."""
    cooldown = 0.2 if optim.cooldown is None else optim.cooldown
    return max(1, round(cooldown * steps if cooldown < 1 else cooldown))


def _engine(config: Config) -> list[str]:
    """What each engine can move to the host's memory, and whose keys are whose."""
    engine = config.engine
    fsdp = engine.name == "fsdp"
    rules = [
        (fsdp and engine.offload == "optimizer",
         "engine.offload=optimizer: FSDP moves optimizer state together with the weights: set parameters or none"),
        (fsdp and bool(engine.deepspeed),
         "engine.deepspeed is read with engine.name=deepspeed only: leave it out with fsdp"),
        (not fsdp and engine.offload == "optimizer" and engine.zero_stage == 0,
         "engine.offload=optimizer: DeepSpeed moves what it shards: set engine.zero_stage to 1, 2 or 3, or "
         "engine.offload to none"),
        (not fsdp and engine.offload == "parameters" and engine.zero_stage < 3,
         f"engine.offload=parameters: at engine.zero_stage={engine.zero_stage} the weights stay on the device: set "
         "engine.zero_stage=3, or engine.offload to optimizer or none"),
    ]
    return [message for violated, message in rules if violated]


def _lengths(config: Config) -> list[str]:
    limit = config.model.max_seq_len
    lengths = {"data.seq_len": config.data.seq_len, "data.val_seq_len": config.data.val_seq_len or 0}
    return [f"{key} ({length}) exceeds model.max_seq_len ({limit}): shorten it or raise model.max_seq_len"
            for key, length in lengths.items() if length > limit]


def _batch(mixers: Sequence[MixerRule], config: Config, world_size: int) -> list[Problem]:
    parallel, train = config.parallel, config.train
    data_ranks, left = divmod(world_size, parallel.tensor * parallel.context)
    if not data_ranks:
        return [f"parallel.tensor x parallel.context = {parallel.tensor * parallel.context} needs as many ranks, "
                f"there are {world_size}"]
    if left:
        return [f"parallel.tensor x parallel.context = {parallel.tensor * parallel.context} does not divide the "
                f"{world_size} ranks: {_fitting_ranks(mixers, config, world_size)}"]
    unit = train.micro_batch_size * data_ranks
    if train.global_batch_size % unit == 0:
        return []
    return [Misfit(f"train.global_batch_size ({train.global_batch_size}) is not a multiple of train.micro_batch_size "
                    f"{train.micro_batch_size} x {data_ranks} data ranks ({unit})", "train.global_batch_size", unit,
                    otherwise=f"change train.micro_batch_size or the number of ranks ({world_size})")]


def _fitting_ranks(mixers: Sequence[MixerRule], config: Config, world_size: int) -> str:
    """The nearest numbers of ranks with which nothing is wrong, as an advice."""
    unit = config.parallel.tensor * config.parallel.context
    first = world_size // unit * unit
    below = next((ranks for ranks in range(first, max(0, first - TRIED * unit), -unit)
                  if not problems(mixers, config, ranks)), None)
    above = next((ranks for ranks in range(first + unit, first + TRIED * unit, unit)
                  if not problems(mixers, config, ranks)), None)
    fitting = [str(ranks) for ranks in (below, above) if ranks is not None]
    return f"start {' or '.join(fitting)}" if fitting else "change parallel.context or parallel.tensor"


def _schedule(config: Config) -> list[str]:
    """Warm-up and cool-down fit into the run."""
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps >= steps:
        return [f"optim.warmup_steps ({optim.warmup_steps}) must be less than train.steps ({steps})"]
    if optim.schedule == "wsd" and optim.warmup_steps + cooldown_steps(optim, steps) > steps:
        return [f"optim.warmup_steps ({optim.warmup_steps}) and the {cooldown_steps(optim, steps)} steps of "
                f"optim.cooldown are more than train.steps ({steps}): use a cool-down of at most "
                f"{steps - optim.warmup_steps} steps"]
    return []


def _warmup_stages(config: Config, world_size: int) -> list[tuple[str, Stage]]:
    """The stages before data.seq_len, each with its name in a message."""
    data_ranks = max(world_size // (config.parallel.tensor * config.parallel.context), 1)
    listed = isinstance(config.train.seq_len_warmup, list)
    return [(f"train.seq_len_warmup[{stage.index}]" if listed else f"train.seq_len_warmup=double, stage {stage.index}",
             stage) for stage in stages(config, data_ranks=data_ranks)[:-1]]


def _warmup(config: Config, world_size: int) -> list[str]:
    """Lengths grow up to data.seq_len, which is left a step; every micro-batch divides its stage's batch."""
    found: list[str] = []
    train, length = config.train, 0
    named = _warmup_stages(config, world_size)
    for name, stage in named:
        if stage.seq_len > config.data.seq_len:
            found.append(f"{name}: seq_len ({stage.seq_len}) exceeds data.seq_len ({config.data.seq_len}): use at "
                            "most that")
        if stage.seq_len < length:
            found.append(f"{name}: seq_len ({stage.seq_len}) is less than the {length} of the stage before: order "
                            "the stages by length")
        length = stage.seq_len
        if not _batch((), config, world_size):
            found += _stage_batch(config, name, stage, world_size)
    if named and named[-1][1].stop_step >= train.steps:
        taken = named[-1][1].stop_step
        found.append(f"the stages of train.seq_len_warmup take {taken} steps and leave none of train.steps "
                        f"({train.steps}) to data.seq_len: shorten them, or set train.steps to more than {taken}")
    return found


def _stage_batch(config: Config, name: str, stage: Stage, world_size: int) -> list[str]:
    ranks = config.parallel.context
    data_ranks = world_size // (config.parallel.tensor * ranks)
    share = stage.global_batch_size // data_ranks
    if share % stage.micro_batch_size == 0:
        return []
    channels = config.model.hidden_size // config.parallel.tensor
    dealt = (config.parallel.context_method == "all_to_all" or config.data.pack) and ranks > 1

    def fits(size: int) -> bool:
        rows = exchanged_rows(channels=channels, batch=size, groups=config.parallel.overlap_groups)
        return share % size == 0 and (not dealt or deals_out(rows, ranks))

    fitting = [size for size in range(1, share + 1) if fits(size)]
    nearest = min(fitting, key=lambda size: abs(size - stage.micro_batch_size), default=None)
    return [f"{name}: micro_batch_size ({stage.micro_batch_size}) does not divide the {share} windows of a step on "
            f"each of {data_ranks} data ranks: "
            + (f"use {nearest}" if nearest else "change train.global_batch_size, or set "
                                               "parallel.context_method=distributed_fft")]


def _tensor(config: Config) -> list[Problem]:
    """What is split over the tensor ranks divides by them."""
    ranks, model = config.parallel.tensor, config.model
    if config.parallel.sequence and ranks == 1:
        return ["parallel.sequence splits tokens over the tensor ranks: set parallel.tensor > 1, or it to false"]
    inner = "model.hidden_size" if model.ffn_hidden_size is None else "model.ffn_hidden_size"
    sizes = (("model.hidden_size", model.hidden_size, "model.hidden_size", ranks),
             ("model.ffn_hidden_size", model.inner_size, inner, 1 if inner == "model.hidden_size" else ranks),
             ("the padded model.vocab_size", model.padded_vocab_size, "model.vocab_size", VOCAB_MULTIPLE))
    # Of k-mers the vocabulary is larger than its key says.
    return [Misfit(f"{name} ({size}) is not a multiple of parallel.tensor ({ranks})", key, step,
                   near=size if key == "model.vocab_size" else None, otherwise="change parallel.tensor")
            for name, size, key, step in sizes if size % ranks]


def _not_a_multiple(key: str, size: int, divisor: int, of: str) -> str:
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    return f"{key} ({size}) is not a multiple of {of} ({divisor}): use {f'{below} or ' if below else ''}{above}"
