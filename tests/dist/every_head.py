"""Every kind of answer that fine-tuning learns, and every way to adapt a backbone, each with a small table."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import POOLINGS, FinetuneSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from tests.dist import test_finetuning, test_label_kinds
from tests.dist.toy import engine_section

BINS, BIN_SIZE = 5, 12
"""On two context ranks of 32 tokens the third bin lies on both."""
PLACES = {
    "per_base": FinetuneSection(task="per_base", rc="average"),
    "binned": FinetuneSection(task="binned", bin_size=BIN_SIZE, rc="average"),
    "poisson": FinetuneSection(task="binned", bin_size=BIN_SIZE, loss="poisson"),
    "pairs": FinetuneSection(task="pairs", bin_size=BIN_SIZE, diagonals=1, rc="average"),
}
"""Labels of bases, bins and pairs of bins."""
ADAPTED = {
    "lora": FinetuneSection(from_="somewhere", trained="lora", lora_rank=2),
    "head": FinetuneSection(from_="somewhere", trained="head"),
    "prompt": FinetuneSection(from_="somewhere", trained="prompt", prompt_tokens=70, shots=1),
    "shots": FinetuneSection(from_="somewhere", shots=1),
}
"""Classes, learnt from a pretrained backbone."""
SECTIONS = {
    **{pooling: FinetuneSection(pooling=pooling, rc="average") for pooling in POOLINGS},
    "regression": FinetuneSection(task="regression"),
    "multilabel": FinetuneSection(task="multilabel"),
    **ADAPTED, **PLACES,
}


def _places(directory: Path, kind: str) -> Path:
    """Bases whose classes, bins whose two tracks and pairs whose numbers follow from which bases are G or C."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 32), ("dev", 9), ("test", 9)):
        odds = rng.choice([0.1, 0.4], (count, BINS, 1))
        strong = rng.random((count, BINS, BIN_SIZE)) < 2 * odds
        bases = np.where(strong, rng.choice(list("GC"), strong.shape), rng.choice(list("AT"), strong.shape))
        share, known = strong.mean(2), 1 + int(rng.integers(BINS))
        lines = ["sequence,label" if kind in ("per_base", "pairs") else "sequence"]
        for row in range(count):
            sequence, label = "".join(bases[row].flat), ""
            if kind == "per_base":
                length = int(rng.integers(33, BINS * BIN_SIZE))
                label = "," + "".join("sw"[int(not value)] for value in strong[row].flat[:length - 1]) + "."
                sequence = sequence[:length]
            elif kind == "pairs":
                values = np.outer(share[row], share[row])[np.triu_indices(BINS, 1)]
                label = "," + " ".join(f"{value:.4f}" for value in values)
            lines.append(sequence + label)
        tracks = np.stack([8 * share, 4 - 3 * share], 2)
        tracks[0, known - 1, 0] = np.nan
        if kind in ("binned", "poisson"):
            np.save(directory / f"{name}.npy", tracks)
        (directory / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def tables(directory: Path, kinds: Collection[str]) -> None:
    """Tables of these kinds, where `config` says that they are."""
    for kind in kinds:
        path = _path(directory, kind)
        if path.exists():
            continue
        if kind in PLACES:
            _places(path, kind)
        elif path.name == "classes":
            test_finetuning.table(path)
        else:
            test_label_kinds.table(path, kind)


def _path(directory: Path, kind: str) -> Path:
    return directory / ("classes" if SECTIONS[kind].task == "classification" else kind)


def config(directory: Path, name: str, kind: str, engine: int | str = 1, *, tensor: int = 1, context: int = 1,
           sequence: bool = False, **train: Any) -> Config:
    """Of a run of `kind` in the directory `name`."""
    found, section = test_finetuning.config_of(directory, name, engine), SECTIONS[kind]
    tokens = 512 if section.by_tokens else found.model.max_seq_len
    return replace(found, model=replace(found.model, max_seq_len=tokens), data=replace(found.data, seq_len=tokens),
                   finetune=replace(section, table=str(_path(directory, kind)),
                                   baselines="kmers" if kind == "binned" else ""),
                   train=replace(found.train, **train), optim=replace(found.optim, lr=1e-2),
                   engine=engine_section(engine),
                   parallel=ParallelSection(tensor=tensor, context=context, sequence=sequence))


def pretrained(config: Config) -> dict[str, Tensor] | None:
    """The backbone that a run starts from; None where it starts from nothing."""
    if config.finetune.from_ is None:
        return None
    alone = replace(config, train=replace(config.train, seed=9), parallel=ParallelSection())
    return dict(build_model(alone, Groups.single()).named_parameters())
