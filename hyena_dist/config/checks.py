"""Rules that span sections of the configuration. Pure: no disk, network, torch or process group.

`check` collects every violation and raises once, so that a user mends a configuration in one go. What it advises was
tried: a value that it names passes every rule.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import VOCAB_MULTIPLE
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.warmup import Stage, stages


def check(config: Config, *, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    problems = _problems(config, world_size)
    if problems:
        raise ConfigError("; ".join(problem if isinstance(problem, str) else _advised(problem, config, world_size)
                                    for problem in problems))


@dataclass(frozen=True)
class _Misfit:
    """A violated rule that another value of one key may satisfy."""

    text: str
    """Which rule; names the keys and their values."""
    key: str
    """Whose value to change: a whole number."""
    step: int = 1
    """What that value has to be a multiple of."""
    otherwise: str = ""
    """What to do where no other value of the key satisfies all rules, or beside it."""


_TRIED = 64
"""Values of a key, in each direction, that are tried for an advice."""


def _problems(config: Config, world_size: int) -> list["str | _Misfit"]:
    """Every violation."""
    return [*_engine(config), *_lengths(config), *_batch(config, world_size), *_schedule(config),
            *_warmup(config, world_size), *_tensor(config), *_attention(config), *_context(config, world_size)]


def _advised(misfit: _Misfit, config: Config, world_size: int) -> str:
    """What is wrong, and the nearest values of its key that leave nothing wrong that was not so before."""
    others = [problem for problem in _problems(config, world_size) if _key_of(problem) != misfit.key]

    def nearest(values: Iterable[int]) -> list[str]:
        return [str(value) for value in values if _satisfies(_with(config, misfit.key, value), world_size, misfit.key,
                                                             len(others))][:1]

    size, step = _value_of(config, misfit.key), misfit.step
    below = nearest(range((size - 1) // step * step, max(0, size - (_TRIED + 1) * step), -step))
    above = nearest(range((size // step + 1) * step, size + (_TRIED + 1) * step, step))
    advice = f"use {' or '.join([*below, *above])}" if below or above else ""
    if advice and not misfit.text.startswith(misfit.key):
        advice = advice.replace("use", f"set {misfit.key} to", 1)
    alternative = misfit.otherwise if not advice or "=" in misfit.otherwise else ""
    return f"{misfit.text}: {', or '.join(filter(None, [advice, alternative]))}"


def _satisfies(config: Config | None, world_size: int, key: str, others: int) -> bool:
    """Whether no rule finds fault with this key any more, and at most as many as before with others."""
    if config is None:
        return False
    problems = _problems(config, world_size)
    return len(problems) <= others and not any(_key_of(problem) == key for problem in problems)


def _key_of(problem: "str | _Misfit") -> str:
    return "" if isinstance(problem, str) else problem.key


def _value_of(config: Config, key: str) -> int:
    section, name = key.split(".", 1)
    return getattr(getattr(config, section), name)


def _with(config: Config, key: str, value: int) -> Config | None:
    """The configuration with another value of a key; None: the key does not take it."""
    section, name = key.split(".", 1)
    try:
        return replace(config, **{section: replace(getattr(config, section), **{name: value})})
    except ValueError:
        return None


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


def _batch(config: Config, world_size: int) -> list["str | _Misfit"]:
    parallel, train = config.parallel, config.train
    data_ranks, left = divmod(world_size, parallel.tensor * parallel.context)
    if not data_ranks:
        return [f"parallel.tensor x parallel.context = {parallel.tensor * parallel.context} needs as many ranks, "
                f"there are {world_size}"]
    if left:
        return [f"parallel.tensor x parallel.context = {parallel.tensor * parallel.context} does not divide the "
                f"{world_size} ranks: {_fitting_ranks(config, world_size)}"]
    unit = train.micro_batch_size * data_ranks
    if train.global_batch_size % unit == 0:
        return []
    return [_Misfit(f"train.global_batch_size ({train.global_batch_size}) is not a multiple of train.micro_batch_size "
                    f"{train.micro_batch_size} x {data_ranks} data ranks ({unit})", "train.global_batch_size", unit,
                    otherwise=f"change train.micro_batch_size or the number of ranks ({world_size})")]


def _fitting_ranks(config: Config, world_size: int) -> str:
    """The nearest numbers of ranks with which nothing is wrong, as an advice."""
    unit = config.parallel.tensor * config.parallel.context
    first = world_size // unit * unit
    below = next((ranks for ranks in range(first, max(0, first - _TRIED * unit), -unit)
                  if not _problems(config, ranks)), None)
    above = next((ranks for ranks in range(first + unit, first + _TRIED * unit, unit)
                  if not _problems(config, ranks)), None)
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
    problems: list[str] = []
    train, length = config.train, 0
    named = _warmup_stages(config, world_size)
    for name, stage in named:
        if stage.seq_len > config.data.seq_len:
            problems.append(f"{name}: seq_len ({stage.seq_len}) exceeds data.seq_len ({config.data.seq_len}): use at "
                            "most that")
        if stage.seq_len < length:
            problems.append(f"{name}: seq_len ({stage.seq_len}) is less than the {length} of the stage before: order "
                            "the stages by length")
        length = stage.seq_len
        if not _batch(config, world_size):
            problems += _stage_batch(config, name, stage, world_size)
    if named and named[-1][1].stop_step >= train.steps:
        taken = named[-1][1].stop_step
        problems.append(f"the stages of train.seq_len_warmup take {taken} steps and leave none of train.steps "
                        f"({train.steps}) to data.seq_len: shorten them, or set train.steps to more than {taken}")
    return problems


def _stage_batch(config: Config, name: str, stage: Stage, world_size: int) -> list[str]:
    ranks = config.parallel.context
    data_ranks = world_size // (config.parallel.tensor * ranks)
    share = stage.global_batch_size // data_ranks
    if share % stage.micro_batch_size == 0:
        return []
    channels = config.model.hidden_size // config.parallel.tensor // config.parallel.overlap_groups
    dealt = config.parallel.context_method == "all_to_all" and ranks > 1
    fitting = [size for size in range(1, share + 1) if share % size == 0 and not (dealt and channels * size % ranks)]
    nearest = min(fitting, key=lambda size: abs(size - stage.micro_batch_size), default=None)
    return [f"{name}: micro_batch_size ({stage.micro_batch_size}) does not divide the {share} windows of a step on "
            f"each of {data_ranks} data ranks: "
            + (f"use {nearest}" if nearest else "change train.global_batch_size, or set "
                                               "parallel.context_method=distributed_fft")]


def _tensor(config: Config) -> list["str | _Misfit"]:
    """What is split over the tensor ranks divides by them."""
    ranks, model = config.parallel.tensor, config.model
    if config.parallel.sequence and ranks == 1:
        return ["parallel.sequence splits tokens over the tensor ranks: set parallel.tensor > 1, or it to false"]
    inner = "model.hidden_size" if model.ffn_hidden_size is None else "model.ffn_hidden_size"
    sizes = (("model.hidden_size", model.hidden_size, "model.hidden_size", ranks),
             ("model.ffn_hidden_size", model.inner_size, inner, 1 if inner == "model.hidden_size" else ranks),
             ("the padded model.vocab_size", model.padded_vocab_size, "model.vocab_size", VOCAB_MULTIPLE))
    return [_Misfit(f"{name} ({size}) is not a multiple of parallel.tensor ({ranks})", key, step,
                    otherwise="change parallel.tensor") for name, size, key, step in sizes if size % ranks]


def _attention(config: Config) -> list["str | _Misfit"]:
    """Attention layers are split by heads, over tensor and context ranks."""
    model, parallel = config.model, config.parallel
    if "A" not in model.layer_pattern:
        return []
    problems: list[str | _Misfit] = []
    heads = 2 * model.num_attention_heads
    if model.hidden_size % heads:
        problems.append(_Misfit(f"model.hidden_size ({model.hidden_size}) is not a multiple of 2 x "
                                f"model.num_attention_heads ({heads})", "model.hidden_size", heads,
                                otherwise="change model.num_attention_heads"))
    ranks = parallel.tensor * parallel.context
    if model.num_attention_heads % ranks:
        problems.append(_Misfit(f"model.num_attention_heads ({model.num_attention_heads}) is not a multiple of "
                                f"parallel.tensor x parallel.context ({ranks})", "model.num_attention_heads", ranks,
                                otherwise="change parallel.tensor or parallel.context"))
    return problems


def _context(config: Config, world_size: int) -> list["str | _Misfit"]:
    """The exchange deals out whole rows (channels of a tensor rank x micro batch), the short convolution reaches into
    one neighbour only."""
    model, parallel, ranks = config.model, config.parallel, config.parallel.context
    if ranks == 1 or model.hidden_size % parallel.tensor:
        return []
    problems: list[str | _Misfit] = []
    warmup = _warmup_stages(config, world_size)
    channels = model.hidden_size // parallel.tensor
    if channels % parallel.overlap_groups:
        problems.append(_Misfit(f"model.hidden_size / parallel.tensor ({channels}) is not a multiple of "
                                f"parallel.overlap_groups ({parallel.overlap_groups})", "parallel.overlap_groups"))
    elif parallel.context_method == "all_to_all":
        problems += _rows(config, channels // parallel.overlap_groups, warmup)
    least = ranks * (model.short_conv_kernel - 1)
    for key, length in (("data.seq_len", config.data.seq_len), ("data.val_seq_len", config.data.val_seq_len),
                        *((f"{name}: seq_len", stage.seq_len) for name, stage in warmup)):
        if length is not None and length < least:
            reachable = least <= model.max_seq_len
            remedy = f"use {least} or more" if reachable else "lower parallel.context, or raise model.max_seq_len too"
            problems.append(f"{key} ({length}) is too short for parallel.context ({ranks}) ranks: each needs at least "
                            f"model.short_conv_kernel - 1 tokens: {remedy}")
    return problems


def _rows(config: Config, channels: int, warmup: list[tuple[str, Stage]]) -> Iterator["str | _Misfit"]:
    """What the all-to-all of a group of channels cannot deal out to the context ranks."""
    ranks, free = config.parallel.context, "set parallel.context_method=distributed_fft"
    for name, stage in warmup:
        rows = channels * stage.micro_batch_size
        if rows % ranks:
            yield (f"channels x {name}: micro_batch_size of an overlap group ({rows}) is not a multiple of "
                   f"parallel.context ({ranks}): {free}")
    rows = channels * config.train.micro_batch_size
    if rows % ranks:
        yield _Misfit(f"channels x train.micro_batch_size of an overlap group ({rows}) is not a multiple of "
                      f"parallel.context ({ranks})", "train.micro_batch_size", otherwise=free)


def _not_a_multiple(key: str, size: int, divisor: int, of: str) -> str:
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    return f"{key} ({size}) is not a multiple of {of} ({divisor}): use {f'{below} or ' if below else ''}{above}"
