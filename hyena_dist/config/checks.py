"""Rules that span sections of the configuration. Pure: no disk, network, torch or process group.

`check` collects every violation and raises once, so that a user mends a configuration in one go.
"""

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.warmup import Stage, stages


def check(config: Config, *, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    problems = [*_engine(config), *_lengths(config), *_batch(config, world_size), *_schedule(config),
                *_warmup(config, world_size), *_tensor(config), *_attention(config), *_context(config, world_size)]
    if problems:
        raise ConfigError("; ".join(problems))


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


def _batch(config: Config, world_size: int) -> list[str]:
    parallel, train = config.parallel, config.train
    data_ranks = world_size // (parallel.tensor * parallel.context)
    if not data_ranks:
        return [f"parallel.tensor x parallel.context = {parallel.tensor * parallel.context} needs as many ranks, "
                f"there are {world_size}"]
    try:
        accumulation_steps(global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size,
                           data_ranks=data_ranks)
    except ConfigError as error:
        return [str(error)]
    return []


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
    problems, train, length = [], config.train, 0
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
    data_ranks = world_size // (config.parallel.tensor * config.parallel.context)
    share = stage.global_batch_size // data_ranks
    if share % stage.micro_batch_size == 0:
        return []
    fitting = [size for size in range(1, share + 1) if share % size == 0]
    nearest = min(fitting, key=lambda size: abs(size - stage.micro_batch_size))
    return [f"{name}: micro_batch_size ({stage.micro_batch_size}) does not divide the {share} windows of a step on "
            f"each of {data_ranks} data ranks: use {nearest}"]


def _tensor(config: Config) -> list[str]:
    """What is split over the tensor ranks divides by them."""
    ranks, model = config.parallel.tensor, config.model
    if config.parallel.sequence and ranks == 1:
        return ["parallel.sequence splits tokens over the tensor ranks: set parallel.tensor > 1, or it to false"]
    sizes = {"model.hidden_size": model.hidden_size, "model.ffn_hidden_size": model.inner_size,
             "the padded model.vocab_size": model.padded_vocab_size}
    return [_not_a_multiple(key, size, ranks, "parallel.tensor") for key, size in sizes.items() if size % ranks]


def _attention(config: Config) -> list[str]:
    """Attention layers are split by heads, over tensor and context ranks."""
    model, parallel = config.model, config.parallel
    if "A" not in model.layer_pattern:
        return []
    problems = []
    if model.hidden_size % (2 * model.num_attention_heads):
        problems.append(_not_a_multiple("model.hidden_size", model.hidden_size, 2 * model.num_attention_heads,
                                        "2 x model.num_attention_heads"))
    ranks = parallel.tensor * parallel.context
    if model.num_attention_heads % ranks:
        problems.append(_not_a_multiple("model.num_attention_heads", model.num_attention_heads, ranks,
                                        "parallel.tensor x parallel.context"))
    return problems


def _context(config: Config, world_size: int) -> list[str]:
    """The exchange deals out whole rows (channels of a tensor rank x micro batch), the short convolution reaches into
    one neighbour only."""
    model, parallel, ranks = config.model, config.parallel, config.parallel.context
    if ranks == 1 or model.hidden_size % parallel.tensor:
        return []
    problems = []
    warmup = _warmup_stages(config, world_size)
    channels = model.hidden_size // parallel.tensor
    if channels % parallel.overlap_groups:
        problems.append(_not_a_multiple("model.hidden_size / parallel.tensor", channels, parallel.overlap_groups,
                                        "parallel.overlap_groups"))
    elif parallel.context_method == "all_to_all":
        for key, micro in (("train.micro_batch_size", config.train.micro_batch_size),
                           *((f"{name}: micro_batch_size", stage.micro_batch_size) for name, stage in warmup)):
            rows = channels // parallel.overlap_groups * micro
            if rows % ranks:
                problems.append(_not_a_multiple(f"channels x {key} of an overlap group", rows, ranks,
                                                "parallel.context") + ", or parallel.context_method=distributed_fft")
    for key, length in (("data.seq_len", config.data.seq_len), ("data.val_seq_len", config.data.val_seq_len),
                        *((f"{name}: seq_len", stage.seq_len) for name, stage in warmup)):
        if length is not None and length < ranks * (model.short_conv_kernel - 1):
            problems.append(f"{key} ({length}) is too short for parallel.context ({ranks}) ranks: each needs at least "
                            f"model.short_conv_kernel - 1 tokens: use {ranks * (model.short_conv_kernel - 1)} or more")
    return problems


def _not_a_multiple(key: str, size: int, divisor: int, of: str) -> str:
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    return f"{key} ({size}) is not a multiple of {of} ({divisor}): use {f'{below} or ' if below else ''}{above}"
