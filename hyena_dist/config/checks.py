"""Rules that span sections of the configuration. Pure: no disk, network, torch or process group.

`check` collects every violation and raises once, so that a user mends a configuration in one go.
"""

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config


def check(config: Config, *, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    problems = [*_unsupported(config), *_lengths(config), *_batch(config, world_size), *_schedule(config)]
    if problems:
        raise ConfigError("; ".join(problems))


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, data_ranks: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises:
        ConfigError: the global batch is not a multiple of micro batch x data ranks; names the nearest that is.
    """
    unit = micro_batch_size * data_ranks
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        raise ConfigError(f"train.global_batch_size ({global_batch_size}) is not a multiple of train.micro_batch_size "
                          f"({micro_batch_size}) x data-parallel ranks ({data_ranks}): use "
                          + (f"{below} or {above}" if below else f"{above}"))
    return global_batch_size // unit


def _unsupported(config: Config) -> list[str]:
    """Keys whose values are part of the design and not built yet: refused, never ignored."""
    rules = [
        (config.parallel.tensor > 1, "parallel.tensor > 1 is not supported yet: set it to 1"),
        (config.parallel.context > 1, "parallel.context > 1 is not supported yet: set it to 1"),
        (config.parallel.sequence, "parallel.sequence is not supported yet: set it to false"),
        (config.engine.name == "fsdp", "engine.name=fsdp is not supported yet: use deepspeed"),
        (config.engine.offload != "none", "engine.offload is not supported yet: set it to none"),
        (config.train.precision == "fp16", "train.precision=fp16 is not supported yet: use bf16 or fp32"),
        (bool(config.train.seq_len_warmup), "train.seq_len_warmup is not supported yet: set it to []"),
        ("A" in config.model.layer_pattern, "model.layer_pattern: attention layers (A) are not supported yet: use H"),
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
    if config.optim.warmup_steps < config.train.steps:
        return []
    return [f"optim.warmup_steps ({config.optim.warmup_steps}) must be less than train.steps ({config.train.steps})"]
