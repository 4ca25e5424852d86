"""Pooled states of a frozen backbone, computed once for each sequence and kept in files: what a probe learns from."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.data.labelled import Labelled, encoded
from hyena_dist.data.tables import Example
from hyena_dist.data.tokenizer import PAD, tokenizer_of
from hyena_dist.model.pooled import PooledModel
from hyena_dist.model.trained import tensors_digest
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window
from hyena_dist.runtime.agree import agree, broadcast
from hyena_dist.runtime.files import write_whole

logger = logging.getLogger(__name__)

PIECE = 1024
"""Sequences of a file: what is lost at most where the computation is cut off."""
_WIDTH = 64


def distinct(labelled: Labelled) -> list[Example]:
    """The different sequences of all splits, in an order of their own."""
    found = {example.key: example for examples in labelled.splits.values() for example in examples}
    return [found[key] for key in sorted(found)]


def digest_of(config: Config, weights: Mapping[str, Tensor], sequences: Sequence[Example], *, both: bool) -> str:
    """sha256 of all that features depend on: the model and its weights, how it computes and pools, the sequences."""
    found = sha256(json.dumps([asdict(config.model), config.finetune.pooling, config.train.precision, both]).encode())
    found.update(tensors_digest(weights).encode())
    for example in sequences:
        found.update(example.key)
    return found.hexdigest()


def features(model: PooledModel, config: Config, weights: Mapping[str, Tensor], sequences: Sequence[Example],
             directory: Path, groups: Groups, *, both: bool) -> list[Path]:
    """Files that together hold float32 [n, S, D] in the order of the sequences, S strands. Collective: each data rank
    computes a part of every file, and the first rank writes it. A file that is there is not computed again.

    Args:
        weights: of the whole backbone, which the files are told apart by.
        directory: of all features; those of this digest are in a directory of their own.
        both: whether the other strand is computed too.
    """
    digest = digest_of(config, weights, sequences, both=both)
    place = directory / digest
    paths = [place / f"part-{number:05d}.npy" for number in range(-(-len(sequences) // PIECE))]
    shape = (1 + both, config.model.hidden_size)
    todo = broadcast([number for number, path in enumerate(paths) if groups.world.rank == 0 and not _is_whole(
        path, (len(sequences[number * PIECE : (number + 1) * PIECE]), *shape))], groups)
    agree(partial(_make, place, groups), groups)
    model.eval()
    for number in todo:
        if groups.world.rank == 0:
            logger.info("features: file %d of %d", number + 1, len(paths))
        found = _compute(model, config, sequences[number * PIECE : (number + 1) * PIECE], groups, both=both)
        agree(partial(_write, paths[number], found, groups), groups)
    return paths


@torch.no_grad()
def _compute(model: PooledModel, config: Config, sequences: Sequence[Example], groups: Groups, *,
             both: bool) -> np.ndarray:
    """float32 [n, S, D], the same on every rank."""
    tokenizer, data, micro = tokenizer_of(config.model), groups.data, config.train.micro_batch_size
    device = model.head.weight.device
    found = torch.zeros(len(sequences), 1 + both, config.model.hidden_size, device=device)
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].length)  # little padding
    for first in range(data.rank * micro, len(order), data.size * micro):
        numbers = order[first : first + micro]
        for strand in range(1 + both):
            rows = [encoded(sequences[number], tokenizer, reverse=bool(strand)) for number in numbers]
            width = min(-(-max(map(len, rows)) // _WIDTH) * _WIDTH, config.model.max_seq_len)
            start, tokens, _ = part_of_window(width, groups.context, multiple=model.token_multiple)
            ids = torch.full((len(rows), tokens), PAD)
            for row, sequence in zip(ids, rows, strict=True):
                part = torch.from_numpy(sequence[start : start + tokens].astype(np.int64))
                row[: len(part)] = part
            lengths = torch.tensor([len(row) for row in rows])
            found[torch.tensor(numbers), strand] = model.pooled(ids.to(device), lengths.to(device)).float()
    if data.size > 1:
        dist.all_reduce(found, group=data.group)
    return found.cpu().numpy()


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether features of this shape can be read there; what is damaged is computed again."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        return False


def _make(place: Path, groups: Groups) -> None:
    if groups.world.rank == 0:
        place.mkdir(parents=True, exist_ok=True)


def _write(path: Path, found: np.ndarray, groups: Groups) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.save(file, found)

    if groups.world.rank == 0:
        write_whole(path, write)
