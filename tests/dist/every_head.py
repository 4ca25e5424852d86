"""Every kind of answer that fine-tuning learns, each with a small table of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import POOLINGS, FinetuneSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from tests.dist import test_finetuning, test_label_kinds, test_place_finetuning
from tests.dist.toy import engine_section

PRETRAINED: dict[str, Any] = {"from_": "somewhere"}
SECTIONS = {
    **{pooling: FinetuneSection(pooling=pooling, rc="average") for pooling in POOLINGS},
    "regression": FinetuneSection(task="regression"),
    "multilabel": FinetuneSection(task="multilabel"),
    "lora": FinetuneSection(**PRETRAINED, trained="lora", lora_rank=2),
    "head": FinetuneSection(**PRETRAINED, trained="head"),
    "prompt": FinetuneSection(**PRETRAINED, trained="prompt", prompt_tokens=70, shots=1),
    "shots": FinetuneSection(**PRETRAINED, shots=1),
    **test_place_finetuning.SECTIONS,
}


def tables(directory: Path) -> None:
    """Every kind's table, at the path that `config` gives to the run."""
    test_finetuning.table(directory / "classification")
    for task in ("regression", "multilabel"):
        test_label_kinds.table(directory / task, task)
    for kind in test_place_finetuning.SECTIONS:
        test_place_finetuning.table(directory / kind, kind)


def config(directory: Path, name: str, kind: str, engine: int | str = 1, *, tensor: int = 1, context: int = 1,
           sequence: bool = False, **train: Any) -> Config:
    """Of a run of `kind` in the directory `name`."""
    found = test_finetuning.config_of(directory, name, engine)
    section = SECTIONS[kind]
    table = kind if (directory / kind).is_dir() else "classification"
    long = 512 if section.by_tokens else found.model.max_seq_len
    return replace(found, model=replace(found.model, max_seq_len=long), data=replace(found.data, seq_len=long),
                   finetune=replace(section, table=str(directory / table), baselines=""),
                   train=replace(found.train, **train), engine=engine_section(engine),
                   parallel=ParallelSection(tensor=tensor, context=context, sequence=sequence))


def pretrained(config: Config) -> dict[str, Tensor] | None:
    """The backbone that a run starts from; None where it starts from nothing."""
    if config.finetune.from_ is None:
        return None
    model = build_model(replace(config, train=replace(config.train, seed=9), parallel=ParallelSection()),
                        Groups.single())
    return dict(model.named_parameters())
