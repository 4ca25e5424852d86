"""A fine-tuning that has ended, without its steps: weights that were drawn and not learnt, judged as a run judges its
own."""

import json
from pathlib import Path
from typing import Any

import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import save_checkpoint
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert.directory import _Untrained
from hyena_dist.data.labelled import read_labelled
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.comparison import summary
from hyena_dist.tasks.finetune import RESULT, _result_of, of_seed
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.prompting import Prompting

LONGEST = 64


def config_of(run_dir: Path, table: Path, *, kmer: int = 1, **tune: Any) -> Config:
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=LONGEST, filter_order=8, embed_dropout=0.1,
                           kmer=kmer),
        data=DataSection(shards="none", seq_len=LONGEST),
        train=TrainSection(run_dir=str(run_dir), steps=1, micro_batch_size=4, global_batch_size=4),
        finetune=FinetuneSection(table=str(table), **tune))


def finish(config: Config) -> Path:
    """Every seed's directory as a run of `tasks.finetune` leaves it, and what all say together; returns train.run_dir.
    The weights of the head are large, so that answers differ."""
    results = []
    for seed in range(config.finetune.seeds):
        run = of_seed(config, seed)
        labelled = read_labelled(run.finetune, seed=seed, most=LONGEST)
        learns = Prompting if run.finetune.by_tokens else Finetuning
        task = learns(run, Groups.single(), torch.device("cpu"), labelled=labelled, weights=None)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in task.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        directory = Path(run.train.run_dir)
        checkpoint = step_directory(directory / "checkpoints", 1)
        checkpoint.parent.mkdir(parents=True)
        save_checkpoint(checkpoint, _Untrained(task.module), task.table, Groups.single(), {  # type: ignore[arg-type]
            "step": 1, "identity": identity(run), "config": dump_config(run), "objective": task.name, "frozen": [],
            "data": task.state_dict(), "val_loss": 1.0, "best_val_loss": 1.0, "loss_scale": None, "seconds": 0.0,
            "version": "0"})
        (directory / "config.yaml").write_text(dump_config(run), encoding="utf-8")
        found = [task.predict(task.module, split, iter) for split in ("valid", "test") if split in labelled.splits]
        results.append({**_result_of(run, labelled, found, Groups.single()), "checkpoint": checkpoint.name, "steps": 1})
        (directory / RESULT).write_text(json.dumps(results[-1]), encoding="utf-8")
    whole = summary([{**result, "baselines": {}} for result in results])
    Path(config.train.run_dir, RESULT).write_text(json.dumps(whole), encoding="utf-8")
    return Path(config.train.run_dir)


