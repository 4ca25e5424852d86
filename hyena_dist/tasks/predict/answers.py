"""The answers of fine-tuned models to all sequences of a file, and the file of them."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.config.sections.finetune import PLACES
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.data.asked import Asked
from hyena_dist.data.labelled import Labelled
from hyena_dist.data.tables import Example
from hyena_dist.model.kinds import refuse_context
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, agree_where_shared
from hyena_dist.tasks.columns import ENDINGS, check_ending
from hyena_dist.tasks.parts import Parts, names
from hyena_dist.tasks.predict.files import check_arrays, outputs, write_arrays, write_rows
from hyena_dist.tasks.predict.finished import SPLIT, Finished, described, labelled_as, open_model
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.prompting import check_prompting

CHUNK_SEQUENCES, CHUNK_BASES = 4096, 1 << 22
"""A part has no more sequences or bases than this, if a batch has not: what a kill loses is small."""


@dataclass(frozen=True)
class Request:
    """What is asked, and where the answers go."""

    runs: Sequence[Finished]
    asked: Asked
    sequences: Path
    """Where those came from."""
    out: Path


def check_request(request: Request) -> tuple[Parts, list[Labelled]]:
    """Refuse, before anything is computed, what cannot be answered or written; and what is asked, as each of the runs
    reads it.

    Raises:
        UserError: the file is there or of another kind, the names of arrays come twice, the training sequences are
            needed and not there, or a sequence does not fit behind what is shown before it.
    """
    parts = Parts(request.out)
    if request.runs[0].task in PLACES:
        check_arrays(request.out, request.asked, request.sequences)
    else:
        check_ending("--out", request.out, ENDINGS)
    parts.check_outputs(outputs(request.out))
    labelled = [labelled_as(run, request.asked.examples) for run in request.runs]
    for run, of_run in zip(request.runs, labelled, strict=True):
        if run.config.finetune.by_tokens:
            check_prompting(run.config, of_run)
    return parts, labelled


def predict(request: Request, groups: Groups, device: torch.device) -> Counter[str]:
    """Answer all sequences and write the file, on every rank; what was killed goes on where it was. Collective.

    Returns:
        Of classes how often each was said, on the first rank.

    Raises:
        UserError: as of `check_request` and `open_model`; or parts of another call lie beside the file.
    """
    parts, read = agree(lambda: check_request(request), groups)
    agree(lambda: refuse_context(request.runs[0].config.model, groups.context.size), groups)
    facts = _facts(request, read[0], groups, device)
    first = groups.world.rank == 0
    parts.begin(facts, groups)
    for number, (run, labelled) in enumerate(zip(request.runs, read, strict=True)):
        task = open_model(run, labelled, groups, device)
        agree_where_shared(partial(_answer, request, number, task, parts, groups), groups)
    return agree(lambda: _finish(request, read[0], parts, facts) if first else Counter(), groups)


def _facts(request: Request, labelled: Labelled, groups: Groups, device: torch.device) -> dict[str, Any]:
    """Everything that decides what is in the file, and nothing that changes from call to call."""
    examples = request.asked.examples
    return {"version": own_version(), "torch": library_version("torch"), **described(request.runs),
            "device": device.type, "context": groups.context.size, "sequences": request.sequences.name,
            "sequences_sha256": labelled.digest(), "count": len(examples)}


def _chunks(examples: Sequence[Example], micro: int) -> Iterator[range]:
    """The numbers of the sequences of each part: whole batches of `micro`, as in the evaluation of a run."""
    start = bases = 0
    for first in range(0, len(examples), micro):
        more = sum(example.length for example in examples[first : first + micro])
        if first > start and (first + micro - start > CHUNK_SEQUENCES or bases + more > CHUNK_BASES):
            yield range(start, first)
            start, bases = first, 0
        bases += more
    yield range(start, len(examples))


def _answer(request: Request, seed: int, task: Finetuning, parts: Parts, groups: Groups) -> None:
    """Answer the chunks of this data rank that are not there yet."""
    examples, run = request.asked.examples, request.runs[seed]
    kind = np.float32 if run.task in PLACES else np.float64
    bar = Progress(TextColumn(f"sequences, {run.path.name}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                   console=Console(file=sys.stderr), disable=groups.world.rank > 0 or not sys.stderr.isatty())
    with bar:
        progress = bar.add_task("", total=len(examples))
        for number, chunk in enumerate(_chunks(examples, run.config.train.micro_batch_size)):
            name = names([seed, number])
            if number % groups.data.size == groups.data.rank and not parts.has(name, groups):
                try:
                    found = {str(place): answer.astype(kind) for place, answer in
                             task.answer(task.module, SPLIT, chunk)}
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    longest = max(examples[place].length for place in chunk)
                    raise ConfigError(f"{request.sequences}: sequences of {longest:,} bases do not fit into the free "
                                      "memory: free some, or share them among ranks with --context") from error
                if groups.context.rank == 0:
                    parts.save(name, **found)
            bar.advance(progress, len(chunk))


def _of_seed(request: Request, seed: int, parts: Parts) -> Iterator[np.ndarray]:
    """The answers of one seed, in the order of the sequences."""
    micro = request.runs[seed].config.train.micro_batch_size
    for number, chunk in enumerate(_chunks(request.asked.examples, micro)):
        part = parts.need(names([seed, number]))
        yield from (part[str(place)] for place in chunk)


def _averaged(request: Request, parts: Parts) -> Iterator[np.ndarray]:
    """The mean over the seeds of the answers to each sequence: of logits, or of numbers."""
    seeds = [_of_seed(request, seed, parts) for seed in range(len(request.runs))]
    for answers in zip(*seeds, strict=True):
        yield np.mean(answers, 0)


def _finish(request: Request, labelled: Labelled, parts: Parts, facts: Mapping[str, Any]) -> Counter[str]:
    """Join the parts, which go last."""
    write = write_rows if labelled.places is None else write_arrays
    said = write(request.out, request.asked, labelled, _averaged(request, parts), facts)
    parts.remove()
    return said
