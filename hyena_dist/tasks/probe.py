"""A probe: what scikit-learn's regressions and forest make of the pooled states of a frozen backbone."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.data.labelled import Labelled
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree_at_length, broadcast
from hyena_dist.tasks.baselines import CHOOSES
from hyena_dist.tasks.comparison import number
from hyena_dist.tasks.features import distinct, features
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.predictions import scores_of

logger = logging.getLogger(__name__)

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Of the regularisation that are tried, as C of a logistic regression and 1 / alpha of a ridge."""
TREES = 300


def probe(config: Config, labelled: Labelled, groups: Groups, device: torch.device,
          weights: Mapping[str, Tensor] | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the best probe says of valid and test, float64 [n, outputs] as logits or numbers, and how it was chosen: on
    valid alone, by the metric of the k-mer regression beside it; test is answered once, with the choice. Collective.

    With `finetune.rc` both strands of a training sequence are learnt from, and with average the answer is the mean over
    both, of logits.
    """
    both, average = config.finetune.rc != "none", config.finetune.rc == "average"
    if weights is None:
        raise ConfigError("finetune.trained=probe needs a pretrained model: give it as finetune.from")
    model = Finetuning(config, groups, device, labelled=labelled, weights=weights).module
    assert isinstance(model, PooledModel)
    sequences = distinct(labelled)
    # The features of all seeds are the same: they lie beside the seeds' directories.
    paths = features(model, config, weights, sequences, Path(config.train.run_dir).parent / "features", groups,
                     both=both)

    def chosen() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if groups.world.rank:
            return {}, {}
        number = {example.key: place for place, example in enumerate(sequences)}
        whole = np.concatenate([np.load(path) for path in paths])
        of_split = {name: whole[[number[example.key] for example in examples]]
                    for name, examples in labelled.splits.items()}
        return choose(labelled, of_split, average=average, seed=config.train.seed)

    return broadcast(agree_at_length(chosen, groups), groups)


def choose(labelled: Labelled, of_split: Mapping[str, np.ndarray], *, average: bool,
           seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The answers of the best probe, and how it was chosen.

    Args:
        of_split: float [n, S, D], features of the strands of each sequence.
        average: answers are means over the strands; else they are of the first.

    Raises:
        ConfigError: a feature is no finite number, from which nothing could be learnt.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler

    for name, values in of_split.items():
        if not np.isfinite(values).all():
            raise ConfigError(f"finetune.from: its states of the sequences of {name} are no numbers (NaN): give "
                              "another checkpoint, or train.precision=fp32")
    train, strands = of_split["train"], of_split["train"].shape[1]
    scaler = StandardScaler().fit(train.reshape(-1, train.shape[2]).astype(np.float64))
    rows = scaler.transform(train.transpose(1, 0, 2).reshape(-1, train.shape[2]))
    targets = np.concatenate([labelled.targets("train")] * strands)

    def answer(model: Any, split: str) -> np.ndarray:
        shown = of_split[split] if average else of_split[split][:, :1]
        return np.mean([_answers(labelled, model, scaler.transform(shown[:, strand].astype(np.float64)))
                        for strand in range(shown.shape[1])], 0)

    chooses, tried = CHOOSES[labelled.task], []
    best: tuple[float, Any, np.ndarray] | None = None
    for name, strength, model in _models(labelled.task, seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows, targets)
        answers = answer(model, "valid")
        value = scores_of(labelled.task, answers, labelled.targets("valid"))[chooses]
        tried.append({"probe": name, "strength": strength, chooses: value})
        logger.info("probe: %s%s: %s %s on valid", name, "" if strength is None else f", strength {strength:g}",
                    chooses, number(value))
        value = -np.inf if value is None else value
        if best is None or value > best[0]:
            best, chosen = (value, model, answers), tried[-1]
    assert best is not None
    found = {"valid": best[2]} | ({"test": answer(best[1], "test")} if "test" in of_split else {})
    return found, {**chosen, "chosen_by": chooses, "tried": tried}


def _models(task: str, seed: int) -> Iterator[tuple[str, float | None, Any]]:
    """The probes of a task, by name and strength."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
    from sklearn.multiclass import OneVsRestClassifier

    numbers = task == "regression"
    for strength in STRENGTHS:
        if not numbers:
            logistic = LogisticRegression(C=strength, max_iter=500)
            yield "logistic", strength, OneVsRestClassifier(logistic) if task == "multilabel" else logistic
        yield "ridge", strength, (Ridge if numbers else RidgeClassifier)(alpha=1 / strength)
    forest = RandomForestRegressor if numbers else RandomForestClassifier
    yield "forest", None, forest(n_estimators=TREES, random_state=seed, n_jobs=-1)


def _answers(labelled: Labelled, model: Any, rows: np.ndarray) -> np.ndarray:
    """[n, outputs], as a fine-tuned model gives them: logits, or numbers."""
    if labelled.task == "regression":
        return model.predict(rows)[:, None]
    if hasattr(model, "decision_function"):
        found = model.decision_function(rows)
        if labelled.task == "classification" and found.ndim == 1:  # two classes have one number
            return np.stack([-found / 2, found / 2], 1)
        return found.reshape(len(found), -1)
    # A forest gives frequencies of its trees; none is certain.
    chances = model.predict_proba(rows)
    if labelled.task == "classification":
        return np.log(np.clip(chances, 0.5 / TREES, 1))
    if not isinstance(chances, list):  # of a single label
        chances = [chances]
    # Of a label that all training sequences have, or none, there is one column.
    one = [column[:, 1] if column.shape[1] == 2 else np.full(len(rows), float(classes[0]))
           for column, classes in zip(chances, model.classes_ if len(chances) > 1 else [model.classes_], strict=True)]
    likely = np.clip(np.stack(one, 1), 0.5 / TREES, 1 - 0.5 / TREES)
    return np.log(likely) - np.log1p(-likely)
