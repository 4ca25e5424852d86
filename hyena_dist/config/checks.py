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
    problems = [*_unsupported(config), *_lengths(config), *_batch(config, world_size), *_schedule(config),
                *_tensor(config), *_attention(config), *_context(config)]
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


def _unsupported(config: Config) -> list[str]:
    """Keys whose values are part of the design and not built yet: refused, never ignored."""
    rules = [
        (config.engine.name == "fsdp", "engine.name=fsdp is not supported yet: use deepspeed"),
        (config.engine.offload != "none", "engine.offload is not supported yet: set it to none"),
        (config.train.precision == "fp16", "train.precision=fp16 is not supported yet: use bf16 or fp32"),
        (bool(config.train.seq_len_warmup), "train.seq_len_warmup is not supported yet: set it to []"),
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


def _context(config: Config) -> list[str]:
    """The exchange deals out whole rows (channels of a tensor rank x micro batch), the short convolution reaches into
    one neighbour only."""
    model, parallel, ranks = config.model, config.parallel, config.parallel.context
    if ranks == 1 or model.hidden_size % parallel.tensor:
        return []
    problems = []
    channels = model.hidden_size // parallel.tensor
    if channels % parallel.overlap_groups:
        problems.append(_not_a_multiple("model.hidden_size / parallel.tensor", channels, parallel.overlap_groups,
                                        "parallel.overlap_groups"))
    elif parallel.context_method == "all_to_all":
        rows = channels // parallel.overlap_groups * config.train.micro_batch_size
        if rows % ranks:
            problems.append(_not_a_multiple("channels x train.micro_batch_size of an overlap group", rows, ranks,
                                            "parallel.context") + ", or parallel.context_method=distributed_fft")
    for key, length in (("data.seq_len", config.data.seq_len), ("data.val_seq_len", config.data.val_seq_len)):
        if length is not None and length < ranks * (model.short_conv_kernel - 1):
            problems.append(f"{key} ({length}) is too short for parallel.context ({ranks}) ranks: each needs at least "
                            f"model.short_conv_kernel - 1 tokens: use {ranks * (model.short_conv_kernel - 1)} or more")
    return problems


def _not_a_multiple(key: str, size: int, divisor: int, of: str) -> str:
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    return f"{key} ({size}) is not a multiple of {of} ({divisor}): use {f'{below} or ' if below else ''}{above}"
