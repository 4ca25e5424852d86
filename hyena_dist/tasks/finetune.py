"""Fine-tuning from a configuration to an answer: a run for each seed, its best weights judged once, what stands beside
it on the same sequences, and what all of them say together."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from hyena_dist.checkpoint.directory import find_best
from hyena_dist.config.errors import TrainingError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import words_of
from hyena_dist.data.labelled import Labelled
from hyena_dist.model.trained import tensors_digest
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, agree_at_length, broadcast
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.baselines import kmer_baseline
from hyena_dist.tasks.comparison import OTHERS, in_words, markdown, on_screen, summary
from hyena_dist.tasks.made_of import (
    RESULT,
    check_kmers,
    check_made_of,
    keep_made_of,
    made_of,
    of_kmers,
    read_found,
)
from hyena_dist.tasks.place_baselines import place_baselines
from hyena_dist.tasks.probe import probe
from hyena_dist.train.answers import Judgement
from hyena_dist.train.convolutional import Convolutional
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.predictions import Predictions
from hyena_dist.train.prompting import Prompting
from hyena_dist.train.session import open_trainer
from hyena_dist.train.trainer import Trainer

logger = logging.getLogger(__name__)

TABLE, PREDICTIONS, KMERS = "result.md", "predictions.tsv", "kmers.json"


@dataclass(frozen=True)
class Place:
    """Where and with what fine-tunings run."""

    groups: Groups
    device: torch.device
    weights: Mapping[str, Tensor] | None
    """Of the whole pretrained backbone by name; None: fresh ones."""
    launchers: Sequence[psutil.Process] | None

    @cached_property
    def start(self) -> str | None:
        """Digest of the weights."""
        return None if self.weights is None else tensors_digest(self.weights)


class Stopped(Exception):
    """A run was stopped before its end."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def of_seed(config: Config, seed: int) -> Config:
    """The configuration of one of the runs."""
    run_dir = str(Path(config.train.run_dir, f"seed-{seed}"))
    return replace(config, train=replace(config.train, seed=seed, run_dir=run_dir))


def check_runs(config: Config, *, read: Callable[[int], Labelled], weights: Mapping[str, Tensor] | None) -> None:
    """Refuse before anything is begun what `finetune` would refuse of the runs that there are.

    Raises:
        UserError: one was made of something else.
    """
    place = Place(Groups.single(), torch.device("cpu"), weights, None)
    for seed in range(config.train.seed, config.train.seed + config.finetune.seeds):
        run = of_seed(config, seed)
        check_made_of(Path(run.train.run_dir), _made(run, read(seed), place))


def finetune(config: Config, groups: Groups, device: torch.device, *, read: Callable[[int], Labelled],
             weights: Mapping[str, Tensor] | None, launchers: Sequence[psutil.Process] | None = None) -> str | None:
    """Every run that has no result yet, and then result.json and result.md in train.run_dir. Collective.

    Args:
        read: the labelled sequences of a seed.
        weights: as `Finetuning` takes them.

    Returns:
        Why a run was stopped before its end; None: there is a result.

    Raises:
        UserError, TrainingError, OSError: as of `open_trainer` and `Trainer.fit`.
    """
    place, results = Place(groups, device, weights, launchers), []
    try:
        for seed in range(config.train.seed, config.train.seed + config.finetune.seeds):
            run, labelled = of_seed(config, seed), read(seed)
            if config.finetune.trained == "probe":
                found = _remembered(run, labelled, place, partial(_probed, run, labelled, place))
            else:
                learns = Prompting if config.finetune.by_tokens else Finetuning
                found = _trained(run, labelled, place, partial(learns, labelled=labelled, weights=weights),
                                 announced="fine-tuning")
            results.append({**found, "baselines": _beside(run, labelled, place)})
    except Stopped as stopped:
        return stopped.reason
    whole = summary(results)
    agree(partial(_write_json, Path(config.train.run_dir, RESULT), whole, groups), groups)
    agree(partial(_write_text, Path(config.train.run_dir, TABLE), markdown(whole), groups), groups)
    for line in in_words(whole):
        logger.info("%s", line)
    if groups.world.rank == 0:
        Console().print(on_screen(whole))
    return None


def _trained(run: Config, labelled: Labelled, place: Place, objective: Callable[..., Finetuning], *, announced: str
             ) -> dict[str, Any]:
    """The result of a run of the trainer.

    Args:
        announced: what the steps are of that follow in the log.

    Raises:
        Stopped: before its end.
    """
    def compute() -> dict[str, Any]:
        logger.info("seed %d: %s", run.train.seed, announced)
        with open_trainer(run, place.groups, place.device, launchers=place.launchers, objective=objective) as trainer:
            _keep(run, labelled, place)  # before there is a checkpoint, and after all that could refuse the run
            if reason := trainer.fit():
                raise Stopped(reason)
            return _judge(trainer, run, labelled)

    return _remembered(run, labelled, place, compute)


def _probed(run: Config, labelled: Labelled, place: Place) -> dict[str, Any]:
    """The result of a probe, which takes no step and has no checkpoint."""
    answers, chosen = probe(run, labelled, place.groups, place.device, place.weights)
    found = [Predictions(labelled, split, of_split) for split, of_split in answers.items()]
    return {**_result_of(run, labelled, found, place.groups), "checkpoint": None, "steps": 0, "probe": chosen}


def _remembered(run: Config, labelled: Labelled, place: Place, compute: Callable[[], dict[str, Any]]
                ) -> dict[str, Any]:
    """What an earlier start has found, or what is computed now and is then written. Collective.

    Raises:
        UserError: the earlier start, whether it came to its end or not, was of something else.
    """
    run_dir, groups = Path(run.train.run_dir), place.groups

    def known() -> dict[str, Any] | None:
        if groups.world.rank:
            return None
        check_made_of(run_dir, _made(run, labelled, place))
        return read_found(run_dir / RESULT) if (run_dir / RESULT).is_file() else None

    found = broadcast(agree(known, groups), groups)
    if found is None:
        found = compute()
        agree(partial(_write_json, run_dir / RESULT, found, groups), groups)
    _keep(run, labelled, place)
    return found


def _made(run: Config, labelled: Labelled, place: Place) -> dict[str, Any]:
    """What a run is made of."""
    return made_of(run, labelled.digest(), None if run.finetune.from_ is None else place.start)


def _keep(run: Config, labelled: Labelled, place: Place) -> None:
    """Write beside a run what it is made of. Collective."""
    def keep() -> None:
        if place.groups.world.rank == 0:
            keep_made_of(Path(run.train.run_dir), _made(run, labelled, place))

    agree(keep, place.groups)


def _beside(run: Config, labelled: Labelled, place: Place) -> dict[str, Any]:
    """What stands beside a run, on the same splits: each is computed once, as the run itself."""
    found: dict[str, Any] = {}
    asked = words_of(run.finetune.baselines)
    if labelled.places is not None:  # one answer for a sequence says nothing of its places
        asked = [name for name in asked if name != "cnn"]
    if "kmers" in asked:
        found |= _kmers(run, labelled, place)
    others: dict[str, Callable[..., Finetuning]] = {
        "cnn": partial(Convolutional, labelled=labelled, weights=None),
        "scratch": partial(Finetuning, labelled=labelled, weights=None)}
    for name, objective in others.items():
        if name not in asked or (name == "scratch" and run.finetune.from_ is None):
            continue  # a model that starts from nothing is its own comparison
        tune = replace(run.finetune, from_=None, trained="all", lr_decay=1.0, shots=None)
        train = replace(run.train, run_dir=str(Path(run.train.run_dir, name)))
        one = _trained(replace(run, finetune=tune, train=train), labelled, place, objective,
                       announced=f"now beside it: {OTHERS[name]}")
        found[name] = {key: one[key] for key in ("scores", "steps", "checkpoint")}
    return found


def _kmers(run: Config, labelled: Labelled, place: Place) -> dict[str, dict[str, Any]]:
    """The regression on k-mers, and of places what is said without them; the first rank alone computes and writes
    both."""
    path, groups, both = Path(run.train.run_dir, KMERS), place.groups, run.finetune.rc != "none"
    made = of_kmers(_made(run, labelled, place))

    def found() -> dict[str, Any]:
        if groups.world.rank:
            return {}
        if path.is_file():
            there = read_found(path)
            check_kmers(path, there, made)
            return there
        logger.info("seed %d: now beside it: %s", run.train.seed, OTHERS["kmers"])
        beside = (kmer_baseline(labelled, both_strands=both) if labelled.places is None else
                  place_baselines(labelled, both_strands=both, seed=run.train.seed))
        now = {**beside, "made_of": made}
        _write_json(path, now, groups)
        return now

    known = broadcast(agree_at_length(found, groups), groups)
    return {"kmers": known} if labelled.places is None else {name: known[name] for name in ("kmers", "mean")}


def _judge(trainer: Trainer, config: Config, labelled: Labelled) -> dict[str, Any]:
    """The scores of a run's best weights, by its validation loss; here, and nowhere else, the test split is read."""
    task, groups = trainer.objective, trainer.groups
    assert isinstance(task, Finetuning)
    checkpoints = Path(config.train.run_dir, "checkpoints")
    # The first rank's choice: the others may see the last ones later.
    best = broadcast(agree(lambda: None if groups.world.rank else find_best(checkpoints), groups), groups)
    if best is None:
        raise TrainingError(f"train.run_dir={config.train.run_dir} has no checkpoint with a validation loss: none of "
                            "its losses on valid was finite; lower optim.lr")
    splits = [split for split in ("valid", "test") if split in labelled.splits]
    logger.info("judging the best weights, those of step %d, on %s", best.metadata["step"], " and ".join(splits))
    trainer.state.load(best, weights_alone=True)
    found = [task.predict(trainer.engine.module, split, trainer.watched) for split in splits]
    return {**_result_of(config, labelled, found, groups), "checkpoint": best.path.name, "steps": trainer.status.step}


def _result_of(config: Config, labelled: Labelled, found: Sequence[Judgement], groups: Groups) -> dict[str, Any]:
    """What is written of a run, by what it says of valid and, where there is one, of test."""
    last, tune = found[-1], config.finetune
    agree(partial(_write_text, Path(config.train.run_dir, PREDICTIONS), "".join(f"{line}\n" for line in last.lines()),
                  groups), groups)
    of_split = {one.split: {**one.scores(), "sequences": len(labelled.splits[one.split]), "collapsed": one.collapsed}
                for one in found}
    return {"seed": config.train.seed, "task": tune.task, "classes": labelled.classes, "from": tune.from_,
            "trained": tune.trained, "pooling": tune.pooling, "rc": tune.rc, "judged_on": last.split,
            "sequences": labelled.digest(), "train_sequences": len(labelled.splits["train"]),
            "notes": [*labelled.notes, *last.notes()], "scores": of_split}


def _write_json(path: Path, content: Mapping[str, Any], groups: Groups) -> None:
    _write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", groups)


def _write_text(path: Path, text: str, groups: Groups) -> None:
    if groups.world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
