"""Fine-tuning from a configuration to an answer: a run for each seed, its best weights judged once, and what all of
them say together."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from hyena_dist.checkpoint.directory import find_best
from hyena_dist.config.errors import TrainingError
from hyena_dist.config.plain import read_object
from hyena_dist.config.schema import Config
from hyena_dist.data.labelled import Labelled
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.baselines import kmer_baseline
from hyena_dist.train.answers import Judgement
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.history import Start
from hyena_dist.train.session import open_trainer
from hyena_dist.train.trainer import Trainer

logger = logging.getLogger(__name__)

RESULT, PREDICTIONS = "result.json", "predictions.tsv"


def of_seed(config: Config, seed: int) -> Config:
    """The configuration of one of the runs."""
    run_dir = str(Path(config.train.run_dir, f"seed-{seed}"))
    return replace(config, train=replace(config.train, seed=seed, run_dir=run_dir))


def finetune(config: Config, groups: Groups, device: torch.device, *, read: Callable[[int], Labelled],
             weights: Mapping[str, Tensor] | None, launchers: Sequence[psutil.Process] | None = None) -> str | None:
    """Every run that has no result yet, and then train.run_dir/result.json. Collective.

    Args:
        read: the labelled sequences of a seed.
        weights: as `Finetuning` takes them.

    Returns:
        Why a run was stopped before its end; None: there is a result.

    Raises:
        UserError, TrainingError, OSError: as of `open_trainer` and `Trainer.fit`.
    """
    results = []
    for seed in range(config.train.seed, config.train.seed + config.finetune.seeds):
        run, labelled = of_seed(config, seed), read(seed)
        found = agree(partial(_result, Path(run.train.run_dir, RESULT), labelled), groups)
        if found is None:
            objective = partial(Finetuning, labelled=labelled, weights=weights)
            with open_trainer(run, groups, device, launchers=launchers, objective=objective) as trainer:
                if reason := trainer.fit():
                    return reason
                found = _judge(trainer, run, labelled)
            found["baselines"] = agree(partial(_beside, labelled, run, groups), groups)
            agree(partial(_write_json, Path(run.train.run_dir, RESULT), found, groups), groups)
        results.append(found)
    whole = summary(results)
    agree(partial(_write_json, Path(config.train.run_dir, RESULT), whole, groups), groups)
    for line in in_words(whole):
        logger.info("%s", line)
    return None


def _result(path: Path, labelled: Labelled) -> dict[str, Any] | None:
    """What an earlier start has found of the same sequences; None: nothing."""
    if not path.is_file():
        return None
    found = read_object(path)
    return found if found.get("sequences") == labelled.digest() else None


def _beside(labelled: Labelled, config: Config, groups: Groups) -> dict[str, Any]:
    """The baselines of a run; the first rank alone computes them."""
    if groups.world.rank or labelled.places is not None:  # counts of a sequence's k-mers say nothing of its places
        return {}
    return {"kmers": kmer_baseline(labelled, both_strands=config.finetune.rc != "none")}


def _judge(trainer: Trainer, config: Config, labelled: Labelled) -> dict[str, Any]:
    """The scores of a run's best weights, by its validation loss; here, and nowhere else, the test split is read."""
    task, groups = trainer.objective, trainer.groups
    assert isinstance(task, Finetuning)
    best = agree(lambda: find_best(Path(config.train.run_dir, "checkpoints")), groups)
    if best is None:
        raise TrainingError(f"train.run_dir={config.train.run_dir} has no checkpoint with a validation loss: none of "
                            "its losses on valid was finite; lower optim.lr")
    trainer.state.restore(Start(best, takes="weights"))
    of_split = {}
    for split in ("valid", "test"):
        if split in labelled.splits:
            found = task.predict(trainer.engine.module, split, trainer.watched)
            of_split[split] = {**found.scores(), "sequences": len(labelled.splits[split]), "collapsed": found.collapsed}
            last = found
    agree(partial(_write_predictions, Path(config.train.run_dir, PREDICTIONS), last, groups), groups)
    tune = config.finetune
    return {"seed": config.train.seed, "task": tune.task, "classes": labelled.classes, "from": tune.from_,
            "trained": tune.trained, "pooling": tune.pooling, "rc": tune.rc, "judged_on": last.split,
            "checkpoint": best.path.name, "steps": trainer.status.step, "sequences": labelled.digest(),
            "train_sequences": len(labelled.splits["train"]), "notes": labelled.notes, "scores": of_split}


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several seeds say together: mean, deviation (of a sample, n - 1) and range of each metric on the split that
    was judged, the same of each baseline, and the seeds whose model says one class of everything."""
    first = results[0]
    judged = first["judged_on"]
    common = ("task", "classes", "from", "trained", "pooling", "rc", "judged_on", "notes")
    baselines = {name: _spreads([result["baselines"][name]["scores"][judged] for result in results])
                 for name in first["baselines"]}
    collapsed = [result["seed"] for result in results if result["scores"][judged]["collapsed"]]
    return {**{key: first[key] for key in common},
            "metrics": _spreads([result["scores"][judged] for result in results]), "baselines": baselines,
            "collapsed_seeds": collapsed, "seeds": list(results)}


def _spreads(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each metric its spread over the seeds."""
    return {name: spread([of_seed[name] for of_seed in scores]) for name in scores[0]
            if name not in ("sequences", "collapsed")}


def in_words(whole: Mapping[str, Any]) -> list[str]:
    """A summary as lines for a person."""
    lines = []
    for name, found in whole["metrics"].items():
        beside = [f"{kind} {_number(metrics[name]['mean'])}" for kind, metrics in whole["baselines"].items()]
        lines.append(f"{whole['judged_on']} {name}: {_number(found['mean'])}, from {_number(found['lowest'])} to "
                     f"{_number(found['highest'])} over {len(whole['seeds'])} seeds"
                     + f"; beside it {', '.join(beside)}" * bool(beside))
    if whole["collapsed_seeds"]:
        seeds = ", ".join(map(str, whole["collapsed_seeds"]))
        lines.append(f"seeds {seeds} collapsed: the model says the same of everything")
    return lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Of those values that there are."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "deviation": None, "lowest": None, "highest": None, "seeds": 0}
    mean = math.fsum(found) / len(found)
    deviation = (math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1))
                 if len(found) > 1 else None)
    return {"mean": mean, "deviation": deviation, "lowest": min(found), "highest": max(found), "seeds": len(found)}


def _write_json(path: Path, content: Mapping[str, Any], groups: Groups) -> None:
    if groups.world.rank == 0:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _write_predictions(path: Path, found: Judgement, groups: Groups) -> None:
    if groups.world.rank == 0:
        text = "".join(f"{line}\n" for line in found.lines())
        write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
