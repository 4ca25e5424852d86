"""Sequences that a model goes on with: by any number of ranks, killed and resumed at will, the same file byte for byte.

Sequences are made in batches, which the ranks do in turn, and a batch in stretches of bases. Each stretch is a file in
OUT.parts, which is whole or not there, and begins by reading all before it again: so the numbers of a stretch do not
depend on where an earlier call was killed, and the memory of long ones is that of a stretch.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.data.contigs import Source, as_dna, sequence
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.tokenizer import BYTE_TO_ID, UNK, A, T, decode
from hyena_dist.model.decode import Decoder
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.columns import Columns, check_ending, write_columns
from hyena_dist.tasks.generate.sampling import BASES, Sampling, draw
from hyena_dist.tasks.parts import ANOTHER, Parts, names

STRETCH = 2**15
"""Bases: what a kill can cost, and the length of a memory (`model.decode`)."""
FASTAS = (".fa", ".fasta", ".fna")
"""Endings of what is written: of text, which under a name such as made.fa.gz would be taken for compressed."""
_LINE = 80
"""Bases of a line of FASTA."""
_NO_PROMPT = "generated"
"""Name of what follows no record."""


class Prompt(NamedTuple):
    """What a sequence begins with."""

    name: str
    text: str
    """In upper case; empty only where it is the only prompt."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids, uint8."""
        return BYTE_TO_ID[np.frombuffer(self.text.encode(), np.uint8)]

    @property
    def unread(self) -> int:
        """How many of its letters are none of A, C, G, T and N, as R, which is A or G, or U beside T: the model reads
        each as [UNK]."""
        return int((self.ids == UNK).sum())


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    prompts: list[Prompt]
    samples: int
    """Sequences of each prompt."""
    bases: int
    """Of each sequence behind its prompt."""
    sampling: Sampling
    seed: int
    batch: int
    """Sequences at a time."""
    out: Path
    likelihoods: Path | None = None

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Prompt and sample of every sequence."""
        return [(prompt, sample) for prompt in range(len(self.prompts)) for sample in range(self.samples)]


class Result(NamedTuple):
    """What was done."""

    sequences: int
    made_now: int
    """Bases that this rank made in this call,"""
    seconds: float
    """in this time."""


def prompt_of_text(text: str) -> Prompt:
    """Raises DataError: a letter of no sequence."""
    letters = sequence(text.encode("utf-8"), "--prompt") if text else np.zeros(0, np.uint8)
    return Prompt(_NO_PROMPT, as_dna(letters).tobytes().decode().upper())


def prompts_of_file(path: Path) -> list[Prompt]:
    """Every record of a file of sequence.

    Raises:
        DataError: it cannot be read.
    """
    return [Prompt(contig.name, as_dna(contig.bases).tobytes().decode().upper())
            for contig in read_contigs([Source(path)])]


def generate(trained: Trained, request: Request, groups: Groups) -> Result:
    """Make the sequences and write them. Collective.

    Raises:
        UserError: a prompt and its bases are longer than what the model was trained on, a file exists, or parts of
            another call lie beside it.
    """
    parts = Parts(request.out)
    facts = agree(lambda: _check(trained, request, parts), groups)
    parts.begin(facts, groups)
    start = time.monotonic()
    made = agree(lambda: _make(trained, request, parts, groups), groups)
    seconds = time.monotonic() - start
    agree(lambda: _finish(request, parts, facts) if groups.world.rank == 0 else None, groups)
    return Result(len(request.sequences), made, seconds)


def _check(trained: Trained, request: Request, parts: Parts) -> dict[str, Any]:
    """Refuse what cannot be made, and say what decides what is in the file."""
    for option, value in (("--samples", request.samples), ("--bases", request.bases), ("--batch", request.batch)):
        if value < 1:
            raise ConfigError(f"{option} {value}: give a number of at least 1")
    if request.seed < 0:
        raise ConfigError(f"--seed {request.seed}: give a number of at least 0")
    for prompt in request.prompts:
        if len(prompt.text) + request.bases > trained.seq_len:
            before = f"with the {len(prompt.text)} bases of {prompt.name} before them they " if prompt.text else ""
            raise ConfigError(f"--bases {request.bases}: {before}are more than the {trained.seq_len} that "
                              f"{trained.path} was trained on, and of more it says nothing sensible: give fewer bases"
                              + (", or a shorter prompt" if prompt.text else ""))
    check_ending("--out", request.out, FASTAS)
    files = {"--out": request.out}
    if request.likelihoods is not None:
        check_ending("--likelihoods", request.likelihoods)
        files["--likelihoods"] = request.likelihoods
    parts.check_outputs(files)
    digest = sha256()
    for prompt in request.prompts:
        digest.update(f">{prompt.name}\n{prompt.text}\n".encode())
    return {"version": own_version(), "torch": library_version("torch"), "model": str(trained.path),
            "weights_sha256": trained.digest(), "precision": trained.precision,
            "device": next(trained.model.parameters()).device.type, "prompts": len(request.prompts),
            "prompts_sha256": digest.hexdigest(), "samples": request.samples, "bases": request.bases,
            "seed": request.seed, "batch": request.batch, "stretch": STRETCH, **asdict(request.sampling)}


def _make(trained: Trained, request: Request, parts: Parts, groups: Groups) -> int:
    """Make this rank's stretches that are not there yet; returns how many bases."""
    sequences, world, rank, made = request.sequences, groups.world.size, groups.world.rank, 0
    bar = Progress(TextColumn("bases"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                   console=Console(file=sys.stderr), disable=rank > 0 or not sys.stderr.isatty())
    batches = list(range(0, len(sequences), request.batch))
    with bar:
        task = bar.add_task("", total=sum(len(sequences[first : first + request.batch])
                                          for first in batches[rank::world]) * request.bases)
        for number, first in enumerate(batches):
            if number % world == rank:
                made += _make_batch(trained, request, parts, number, sequences[first : first + request.batch],
                                    lambda bases: bar.advance(task, bases))
    return made


def _make_batch(trained: Trained, request: Request, parts: Parts, number: int, members: list[tuple[int, int]],
                on_bases: Callable[[int], None]) -> int:
    # A sequence's numbers are its own, whatever is made beside it.
    uniform = np.stack([np.random.default_rng([request.seed, prompt, sample]).random(request.bases)
                        for prompt, sample in members])
    texts = [request.prompts[prompt].ids for prompt, _ in members]
    made = 0
    for count, first in enumerate(range(0, request.bases, STRETCH)):
        name = names((number, count))
        part = parts.load(name)
        some = uniform[:, first : first + STRETCH]
        if part is None:
            part = _stretch(trained, texts, some, request, on_bases)
            parts.save(name, **part)
            made += some.size
        else:
            on_bases(some.size)
        texts = [np.concatenate(both) for both in zip(texts, part["ids"], strict=True)]
    return made


@torch.no_grad()
def _stretch(trained: Trained, texts: list[np.ndarray], uniform: np.ndarray, request: Request,
             on_bases: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Go on with some sequences.

    Args:
        texts: all that they have, uint8 token ids.
        uniform: [B, n] numbers by which the bases are drawn.

    Returns:
        ids uint8 [B, n], log_likelihood float32 [B, n], and before, that of the bases before them, of all sequences in
        one.
    """
    device = next(trained.model.parameters()).device
    numbers = torch.from_numpy(uniform).to(device)
    prompts = [torch.from_numpy(text).to(device, torch.int64) for text in texts]
    ids, likelihoods = [], []
    # Before it has read a base the model says nothing: without a prompt all four are as likely.
    if not len(prompts[0]):
        first = A + (numbers[:, 0] * BASES).long()
        ids.append(first)
        likelihoods.append(torch.full_like(numbers[:, 0], torch.nan, dtype=torch.float32))
        prompts = list(first[:, None])
        on_bases(len(first))
    count = numbers.shape[1]
    before = [torch.full((len(text),), torch.nan) for text in texts]
    try:
        if len(ids) < count:
            decoder = Decoder(trained.model, prompts, max(count - len(ids) - 1, 1))
            before = [_of_prompt(logits, prompt) if len(text) else part for logits, prompt, text, part in
                      zip(decoder.prompt_logits, prompts, texts, before, strict=True)]
            logits = decoder.logits
            while len(ids) < count:
                token = draw(logits, numbers[:, len(ids)], request.sampling)
                likelihoods.append(logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0])
                ids.append(token)
                if len(ids) < count:
                    logits = decoder.step(token)
                on_bases(len(token))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"--batch {request.batch}: so many sequences do not fit into the free memory: free some, or "
                          "give fewer") from error
    found = torch.stack(likelihoods, 1)
    told = found if len(texts[0]) else found[:, 1:]  # of the first base of all nothing is predicted
    trained.need_numbers(told.isfinite().all())
    return {"ids": torch.stack(ids, 1).cpu().numpy().astype(np.uint8), "log_likelihood": found.cpu().numpy(),
            "before": torch.cat(before).cpu().numpy()}


def _of_prompt(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of each base of a prompt, float32 [P]; nan of the first, and of what is not A, C, G or T."""
    found = logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    found = found.masked_fill((ids[1:] < A) | (ids[1:] > T), torch.nan)
    return torch.nn.functional.pad(found, (1, 0), value=torch.nan)


class Made(NamedTuple):
    """A sequence that is finished."""

    name: str
    text: str
    """With its prompt."""
    given: int
    """Bases of its prompt."""
    sample: int
    """From 1."""
    log_likelihood: np.ndarray
    """float32 [bases]; nan where the model says nothing."""


def _made(request: Request, parts: Parts) -> Iterator[Made]:
    """All sequences, one batch in memory at a time."""
    sequences = request.sequences
    for number, first in enumerate(range(0, len(sequences), request.batch)):
        members = sequences[first : first + request.batch]
        stretches = [parts.need(names((number, count))) for count in range(-(-request.bases // STRETCH))]
        ids, likelihoods = (np.concatenate([stretch[key] for stretch in stretches], 1)
                            for key in ("ids", "log_likelihood"))
        start = 0
        for row, (place, sample) in enumerate(members):
            prompt = request.prompts[place]
            given = len(prompt.text)
            before = stretches[0]["before"][start : start + given]
            start += given
            yield Made(f"{prompt.name}_{sample + 1}", prompt.text + decode(ids[row]), given, sample + 1,
                       np.concatenate([before, likelihoods[row]]))


def _finish(request: Request, parts: Parts, facts: dict[str, Any]) -> None:
    """Write the files out of their parts, which go last."""
    if request.likelihoods is not None:
        path = request.likelihoods
        groups = (_columns(made) for made in _made(request, parts))
        write_whole(path, lambda aside: write_columns(aside, path.suffix, facts, groups), ANOTHER)
    write_whole(request.out, lambda aside: _write_fasta(aside, request, parts, facts), ANOTHER)
    parts.remove()


def _columns(made: Made) -> Columns:
    count = len(made.text)
    place = np.arange(1, count + 1)
    return {"record": [made.name] * count, "position": place, "base": list(made.text),
            "given": (place <= made.given).astype(np.int8), "log_likelihood": made.log_likelihood}


def _write_fasta(path: Path, request: Request, parts: Parts, facts: dict[str, Any]) -> None:
    shown = {key: "_".join(str(facts[key]).split()) for key in
             ("temperature", "top_k", "top_p", "precision", "weights_sha256", "model")}
    tail = " ".join(f"{key}={value}" for key, value in shown.items())
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for made in _made(request, parts):
            file.write(f">{made.name} seed={request.seed} sample={made.sample} given={made.given} {tail}\n")
            file.writelines(made.text[start : start + _LINE] + "\n" for start in range(0, len(made.text), _LINE))
