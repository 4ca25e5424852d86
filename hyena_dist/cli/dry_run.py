"""What `pretrain.py --dry-run` looks at besides the configuration: shards, checkpoints, the run directory and memory.

What is wrong on every machine is a UserError. What is only missing on this one, which may be a login node, is a warning
with its remedy: shards that are not built yet, a checkpoint that lies elsewhere, a GPU, its memory.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.model.kinds import check
from hyena_dist.train.weights_and_biases import check_installed
from hyena_dist.train.wording import binary

if TYPE_CHECKING:
    from hyena_dist.data.pool import Pool
    from hyena_dist.data.tokenizer import Tokenizer


def check_ranks(config: Config, ranks: int | None) -> tuple[int, list[str]]:
    """Check the configuration for a number of ranks. Nobody has said how many there are (None): the fewest that it can
    have, with a note that says how to ask for others.

    Returns:
        The number of ranks, and notes.

    Raises:
        ConfigError: the configuration cannot run on them.
    """
    if ranks is not None:
        check(config, world_size=ranks)
        return ranks, []
    fewest = config.parallel.tensor * config.parallel.context
    check(config, world_size=fewest)
    return fewest, [f"checked for {fewest} rank{'s' if fewest > 1 else ''}, the fewest that it can have: put "
                    "WORLD_SIZE=N before the command to check it for N"]


def look(config: Config, ranks: int) -> Iterator[str]:
    """Warnings of what is missing on this machine.

    Raises:
        UserError: something is wrong, wherever the run starts.
    """
    data_ranks = ranks // (config.parallel.tensor * config.parallel.context)
    yield from _run_directory(config)
    yield from _shards(config, data_ranks)
    yield from _checkpoints(config)
    yield from _libraries(config)


def packing(config: Config, ranks: int) -> list[str]:
    """How many contigs share windows, where the shards are here and may be packed."""
    if not config.data.pack or any(not path.exists() for path, _ in _paths(config)):
        return []
    from hyena_dist.data.pool import open_pools
    from hyena_dist.train.curriculum import Curriculum
    data_ranks = ranks // (config.parallel.tensor * config.parallel.context)
    with closing(Curriculum(open_pools(config.data), config, dp_size=data_ranks)) as curriculum:
        return curriculum.packed()


def _run_directory(config: Config) -> Iterator[str]:
    path = Path(config.train.run_dir).absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise ConfigError(f"train.run_dir={config.train.run_dir}: {there} is no directory: choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        where = f"train.run_dir={config.train.run_dir}: {there} may not be written to"
        if there in (path, path.parent):
            raise ConfigError(f"{where}: get permission to write there, or choose another")
        yield f"{where} on this machine, and the directories below it are not there"


def _shards(config: Config, data_ranks: int) -> Iterator[str]:
    missing = False
    for path, key in _paths(config):
        if not path.exists():
            missing = True
            yield f"{key}={path} is not on this machine: " + (
                "copy it there, or give another" if key.endswith("regions") else
                f"build it with `python shards/build.py FASTA --out {path}`, or give another")
    if missing:
        return
    from hyena_dist.data.pool import open_pools
    from hyena_dist.train.curriculum import Curriculum
    from hyena_dist.train.pretraining import repeats
    pools = open_pools(config.data)
    with closing(Curriculum(pools, config, dp_size=data_ranks)) as curriculum:
        yield from repeats(curriculum, config.train.steps)
    for pool in pools:
        yield from _lengths(config, pool)
    for index, change in enumerate(config.data.changes()):
        if change.step >= config.train.steps:
            yield (f"data.mixture_schedule[{index}].step ({change.step}) is never reached, train.steps is "
                   f"{config.train.steps}: leave it out, or train longer")


def _paths(config: Config) -> list[tuple[Path, str]]:
    """Where the data lie, each with the key that says so."""
    shards, found = Path(config.data.shards), []
    for index, source in enumerate(config.data.sources()):
        found.append((shards / (source.shards or ""), f"data.mixture[{index}].shards" if source.shards else
                      "data.shards"))
        if source.regions is not None:
            found.append((Path(source.regions), f"data.mixture[{index}].regions"))
    return list(dict.fromkeys(found)) or [(shards, "data.shards")]


def _lengths(config: Config, pool: "Pool") -> Iterator[str]:
    shards = pool.where if pool.name else f"data.shards={pool.where}"
    from hyena_dist.data.tokenizer import tokenizer_of
    tokenizer, lengths = tokenizer_of(config.model), {"train": config.data.seq_len,
                                                      "val": config.data.val_seq_len or config.data.seq_len}
    for split, seq_len in lengths.items():
        longest = max((interval.bases for interval in pool.intervals(split)), default=0)
        key = "data.val_seq_len" if split == "val" and config.data.val_seq_len else "data.seq_len"
        most = tokenizer.tokens(longest) - 1
        if most < 1:
            lost = "it is not validated" if pool.name else "every validation loss will be nan"
            yield (f"{shards} has no bases of split {split}: {lost}: build shards with --val-contigs, --val-fraction "
                   "or --bed")
        elif config.data.pack:
            continue
        elif most < seq_len:
            of = f" of source {pool.name}" if pool.name else ""
            yield (f"{key} ({seq_len}) is more than the longest stretch of split {split}{of} has ({longest:,} bases): "
                   f"every window is padded: use {most} or less, let contigs share windows (data.pack=true), or "
                   "build shards of longer contigs")
        elif split == "train":
            yield from _short(pool, shards, seq_len, tokenizer)


def _short(pool: "Pool", shards: str, seq_len: int, tokenizer: "Tokenizer") -> Iterator[str]:
    """Where half of the windows, or more, hold a contig that does not fill half of them."""
    lengths = [tokenizer.tokens(interval.bases) for interval in pool.intervals("train")]
    short = sum(1 < length <= seq_len // 2 for length in lengths)
    windows = sum(-(-(length - 1) // seq_len) for length in lengths if length > 1)
    if 2 * short >= windows:
        yield (f"{shards}: {short:,} of {windows:,} windows of split train hold a contig of at most half of "
               f"data.seq_len ({seq_len}) and padding: let contigs share windows (data.pack=true), or use shorter ones")


def _checkpoints(config: Config) -> Iterator[str]:
    """What the run would go on from, asked as the run asks it."""
    from hyena_dist.parallel.groups import Groups
    from hyena_dist.runtime.requeue import in_use
    from hyena_dist.train.run_directory import RunDirectory
    run_dir, origin = Path(config.train.run_dir), config.train.origin
    if origin is not None and not Path(origin).exists():
        yield f"train.resume={config.train.resume} is not on this machine: copy it there, or correct the path"
        config = replace(config, train=replace(config.train, resume="auto"))
    run, groups = RunDirectory(config, first=True), Groups.single()
    run.start_from(run.newest(groups), groups)
    if in_use(run_dir):
        yield f"train.run_dir={run_dir} is in use by another run: wait for it to end, stop it, or choose another"


def memory(config: Config, ranks: int, gpu: str | None) -> str:
    """What each rank needs of a GPU, in words.

    Args:
        gpu: a kind of `costs.devices`; None: that of this machine, if it has one.

    Raises:
        ConfigError: that is more than the GPU has; names the layout on as many ranks that fits and changes least. Or
            there is no such kind.
    """
    import torch

    from hyena_dist.cli.plan_table import how
    from hyena_dist.costs.devices import GPUS, find_gpu
    from hyena_dist.costs.plan import Machines, Plan, nearest
    known = find_gpu(gpu) if gpu else GPUS["h100"]  # what it needs does not depend on it
    if gpu is None and torch.cuda.is_available():
        known = replace(known, memory=float(torch.cuda.get_device_properties(0).total_memory))
    plan = Plan(config, Machines(known, ranks, ranks))
    kinds = ", ".join(f"{binary(size)} {name}" for name, size in
                      sorted(plan.categories.items(), key=lambda item: -item[1]) if size >= 0.01 * plan.bytes)
    needed = f"by formula each rank needs {binary(plan.bytes)} of a GPU, most at the {plan.memory.moment}: {kinds}"
    if gpu is None and not torch.cuda.is_available():
        return f"{needed}; add --gpu NAME to compare it with one"
    where = f"{known.name} has" if gpu else "the GPU here has"
    if plan.fits:
        return f"{needed}; {where} {binary(known.memory)}"
    found = nearest(config, plan.machines)
    remedy = (f"the nearest that fits needs {binary(found.bytes)}: set {_changed(config, found.config)} ({how(found)})"
              if found else "nothing fits on as many: take more ranks, larger GPUs, or a shorter data.seq_len")
    raise ConfigError(f"{needed}; {where} {binary(known.memory)}: {remedy}")


def _changed(old: Config, new: Config) -> str:
    """Keys of the second that the first has otherwise."""
    found = []
    for name in ("train", "parallel", "engine"):
        before, after = getattr(old, name), getattr(new, name)
        found += [f"{name}.{key}={str(value).lower() if isinstance(value, bool) else value}"
                  for key, value in vars(after).items() if value != getattr(before, key)]
    return " ".join(found)


def _libraries(config: Config) -> Iterator[str]:
    """Those that only some configurations want."""
    from hyena_dist.ops.backends import check_backend
    for wanted in (lambda: check_backend(config.ops.backend), lambda: check_installed(config.train.wandb)):
        try:
            wanted()
        except ConfigError as error:  # it is not installed here
            yield f"on this machine: {error}"
