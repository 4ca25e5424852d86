"""The first and the last thing that a run says. The first is said before the process group, the engine and the model,
whose imports and set-up take seconds; it opens nothing but the index of the shards."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from hyena_dist.checkpoint.files import MARKER
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.versions import own_version
from hyena_dist.config.warmup import stages, tokens_after
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.memory import run_memory
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, read_index
from hyena_dist.data.splits import SPLITS
from hyena_dist.data.tokenizer import tokenizer_of
from hyena_dist.train.wording import MANY_EPOCHS, TEACHES_LITTLE, amount, binary, counted, duration, score


def banner(config: Config, environment: Mapping[str, str]) -> list[str]:
    """Lines that say what is about to run, all by formula and by what is on this machine.

    Args:
        config: already checked.
        environment: of this rank (`launcher.rank_environment`).
    """
    ranks, parallel = int(environment["WORLD_SIZE"]), config.parallel
    data_ranks = ranks // (parallel.tensor * parallel.context)
    device, room = _device(int(environment["LOCAL_RANK"]))
    engine = config.engine.name + (f" ZeRO {config.engine.zero_stage}" if config.engine.name == "deepspeed" else "")
    layout = " x ".join(f"{size} {name}" for name, size in (("data", data_ranks), ("tensor", parallel.tensor),
                                                            ("context", parallel.context)) if size > 1)
    model = config.model
    lines = {
        "hyena_dist": f"{own_version()}, torch {torch.__version__}",
        "run": f"{config.train.run_dir}, {_start(config)}",
        "device": device,
        "ranks": f"{ranks}{f' = {layout}' if layout else ''}, {engine}, {config.train.precision}",
        "model": f"{parameters(model):,} parameters, {counted(model.num_layers, 'layer')} of "
                 f"{counted(model.hidden_size, 'channel')}, up to {model.max_seq_len:,} tokens{_kmers(model)}",
        "step": _step(config, data_ranks),
        "length": _length(config, data_ranks),
        "memory": _memory(config, device.split(",")[0] == "CPU", ranks, room),
    }
    return [f"{name:10} {text}" for name, text in lines.items()]


def last_line(run_dir: Path, *, steps: int, seconds: float, rate: float | None, final: float,
              best: float, report: Path | None, what: str = "perplexity") -> str:
    """What came of a whole run, and where it lies.

    Args:
        rate: tokens per second, steady; None: not known.
        final, best: of the validation; not finite where there is none.
        what: these are: perplexity or loss.
        report: the picture, if there is one.
    """
    found = f"{steps:,} steps in {duration(seconds)}" + ("" if rate is None else f" at {rate:,.0f} tokens/s")
    if math.isfinite(best):
        found += f", validation {what} {score(final)}, the best {score(best)}"
    where = ", ".join([*([report.name] if report else []), "metrics.jsonl", "tensorboard/", "summary.json",
                       "checkpoints/"])
    return f"done: {found}; in {run_dir}: {where}"


def _kmers(model: ModelSection) -> str:
    """What a token is, where it is no single base."""
    if model.kmer == 1:
        return ""
    return f" of {model.kmer} bases, {'one base apart' if model.kmer_overlap else 'side by side'}"


def _start(config: Config) -> str:
    """How it will start, by the names in the run directory: whether a checkpoint is sound, its reader says later."""
    train = config.train
    names = [path.parent.name for path in (Path(config.train.run_dir) / "checkpoints").glob(f"step-*/{MARKER}")]
    steps = [int(number) for name in names if (number := name.removeprefix("step-")).isdecimal()]
    if steps and train.resume != "none":
        return f"which goes on from step {max(steps):,} of {train.steps:,}"
    if train.origin is None:
        return "a fresh start"
    return f"a fresh start with the weights of {train.origin}" if train.weights_only else f"a branch of {train.origin}"


def _device(local_rank: int) -> tuple[str, int]:
    """Of this rank, by name, and its bytes of memory."""
    if not torch.cuda.is_available():
        memory = psutil.virtual_memory().total
        return f"CPU, {os.cpu_count()} cores and {binary(memory)} for all ranks of this machine", memory
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(min(local_rank, count - 1))
    return (f"{properties.name}, {binary(properties.total_memory)}, one of {count} on this machine",
            properties.total_memory)


def _step(config: Config, data_ranks: int) -> str:
    last = stages(config, data_ranks=data_ranks)[-1]
    micro_batches = last.global_batch_size // (last.micro_batch_size * data_ranks)
    return (f"{counted(last.global_batch_size, 'window')} of {last.seq_len:,} = {last.tokens_per_step:,} tokens, "
            f"{counted(last.micro_batch_size, 'window')} at a time on each data rank, {counted(micro_batches, 'time')}")


def _length(config: Config, data_ranks: int) -> str:
    """Steps, tokens and epochs, with the stages before the full length where there are any."""
    every = stages(config, data_ranks=data_ranks)
    tokens = tokens_after(every, config.train.steps)
    text = f"{config.train.steps:,} steps = {amount(tokens)} tokens"
    if len(every) > 1:
        text += f", the first {every[-1].first_step:,} steps at {' '.join(f'{s.seq_len:,}' for s in every[:-1])}"
    if sources := config.data.sources():
        return f"{text} of a mixture: {', '.join(source.name for source in sources)}"
    try:
        segments = read_index(Path(config.data.shards) / FILE_NAME).segments
    except (DataError, OSError):  # the run says why, in its own words
        return f"{text}; {config.data.shards} cannot be read yet"
    bases = sum(row.end - row.start for row in segments if SPLITS[row.split] == "train")
    if not bases:
        return text
    epochs = tokens * tokenizer_of(config.model).stride / bases
    text += f", {epochs:.3g} epochs of {amount(bases)} training bases"
    return f"{text}: {TEACHES_LITTLE}" if epochs > MANY_EPOCHS else text


def _memory(config: Config, cpu: bool, ranks: int, room: int) -> str:
    memory = run_memory(config, device="cpu" if cpu else "cuda", world_size=ranks)
    return (f"about {binary(memory.total)} a rank by formula ({binary(memory.states)} of "
            f"states, {binary(memory.saved)} kept for the backward pass, {binary(memory.working)} in it), of "
            f"{binary(room)}")
