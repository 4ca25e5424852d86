"""What stands beside the result of a fine-tuning, on the same splits: models that know nothing but counts of k-mers."""

import warnings
from typing import Any

import numpy as np

from hyena_dist.data.labelled import Labelled
from hyena_dist.data.tables import Example, reverse_complement
from hyena_dist.train.predictions import METRICS, scores_of

CHOOSES = {"classification": "mcc", "multilabel": "auroc", "regression": "spearman"}
"""The metric by which one of several models is chosen."""
LENGTHS = (4, 5, 6)
"""Of the k-mers that are tried."""
STRENGTHS = (0.01, 0.1, 1.0)
"""Of the regularisation that are tried: C of a logistic regression, and 1 / alpha of a ridge."""


def kmer_baseline(labelled: Labelled, *, both_strands: bool) -> dict[str, Any]:
    """A logistic regression, or ridge, on the standardised counts of k-mers. k and the regularisation are chosen on
    valid alone, by the same metric that a person looks at; test is scored once, with the choice.

    Args:
        both_strands: whether k-mers of the other strand count, too, as for a model that sees both.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import StandardScaler

    chooses = CHOOSES[labelled.task]
    best: tuple[float, dict[str, Any]] | None = None
    for k in LENGTHS:
        counter = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=True, dtype=np.float64)
        scaler = StandardScaler(with_mean=False)
        try:
            train = scaler.fit_transform(counter.fit_transform(_texts(labelled.splits["train"], both_strands)))
        except ValueError:  # every sequence is shorter than k
            continue
        others = {name: scaler.transform(counter.transform(_texts(examples, both_strands)))
                  for name, examples in labelled.splits.items() if name != "train"}
        for strength in STRENGTHS:
            model = _model(labelled, strength)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train, labelled.targets("train"))
            valid = scores_of(labelled.task, _answers(labelled, model, others["valid"]), labelled.targets("valid"))
            value = valid[chooses]
            value = -np.inf if value is None else value
            if best is None or value > best[0]:
                scores = {"valid": valid}
                if "test" in others:
                    scores["test"] = scores_of(labelled.task, _answers(labelled, model, others["test"]),
                                               labelled.targets("test"))
                best = value, {"k": k, "strength": strength, "chosen_by": chooses, "scores": scores}
    if best is None:
        empty = dict.fromkeys(METRICS[labelled.task])
        return {"k": None, "scores": {name: empty for name in labelled.splits if name != "train"}}
    return best[1]


def _texts(examples: list[Example], both_strands: bool) -> list[str]:
    """A blank stands between the strands: no k-mer spans it that train and test would share by chance."""
    return [(example.bases + b" " + reverse_complement(example.bases) if both_strands else example.bases).decode()
            for example in examples]


def _model(labelled: Labelled, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if labelled.task == "regression":
        return Ridge(alpha=1 / strength)
    logistic = LogisticRegression(C=strength, max_iter=200)
    return OneVsRestClassifier(logistic) if labelled.task == "multilabel" else logistic


def _answers(labelled: Labelled, model: Any, features: Any) -> np.ndarray:
    """[n, outputs], as a fine-tuned model gives them."""
    if labelled.task == "regression":
        return model.predict(features)[:, None]
    found = model.decision_function(features)
    if labelled.task == "classification" and found.ndim == 1:  # two classes have one number
        return np.stack([-found / 2, found / 2], 1)
    return found.reshape(len(found), -1)
