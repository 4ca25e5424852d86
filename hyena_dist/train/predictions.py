"""What a model says of labelled sequences, and how good that is: metrics over the whole set, by scikit-learn."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hyena_dist.data.labelled import Labelled
from hyena_dist.data.tables import NO_LABEL

METRICS = {"classification": ("accuracy", "f1", "f1_macro", "mcc", "auroc", "auprc"),
           "multilabel": ("f1_macro", "auroc", "auprc"),
           "regression": ("pearson", "spearman", "mean_squared_error")}
"""Names of the metrics of each task; f1 is of the second of two classes."""


@dataclass(frozen=True)
class Predictions:
    """Of one split."""

    labelled: Labelled
    split: str
    answers: np.ndarray
    """float64 [n, outputs]: logits, or numbers in the units of the labels."""

    def scores(self) -> dict[str, float | None]:
        """Every metric of the task; None where it has no value."""
        return scores_of(self.labelled.task, self.answers, self.labelled.targets(self.split))

    @property
    def collapsed(self) -> bool:
        """Whether a classifier says the same class of every sequence, or of each class the same."""
        if self.labelled.task == "classification":
            return len(np.unique(self.answers.argmax(1))) == 1
        if self.labelled.task == "multilabel":
            said = self.answers > 0
            return bool((said.all(0) | ~said.any(0)).all())
        return bool(np.ptp(self.answers) == 0)

    def notes(self) -> list[str]:
        """What the metrics leave out, a line each: a class without a sequence is said of the labels already."""
        return []

    def lines(self) -> list[str]:
        """A table of tab-separated values: each sequence, its label, what is said of it, and the numbers."""
        classes = self.labelled.classes
        lines = ["\t".join(["name", "label", "predicted", *(classes or ["value"])])]
        said, numbers = in_words(self.labelled.task, classes, self.answers)
        for example, word, row in zip(self.labelled.splits[self.split], said, numbers, strict=True):
            lines.append("\t".join([example.name, example.label, word, *map(number_text, row)]))
        return lines


def in_words(task: str, classes: Sequence[str], answers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """What answers say of each sequence: the class, the labels or the number; and the probabilities, or the number,
    float64 [n, outputs].

    Args:
        answers: float64 [n, outputs], logits, or numbers in the units of the labels.
    """
    numbers = probabilities(task, answers)
    if task == "classification":
        return [classes[place] for place in numbers.argmax(1)], numbers
    if not classes:
        return [number_text(row[0]) for row in numbers], numbers
    return [";".join(name for name, value in zip(classes, row, strict=True) if value > 0.5) or NO_LABEL
            for row in numbers], numbers


def number_text(value: float) -> str:
    """A number as tables of answers have it."""
    return f"{value:.6g}"


def probabilities(task: str, answers: np.ndarray) -> np.ndarray:
    """[n, outputs], of logits; numbers as they are."""
    if task == "regression":
        return answers
    if task == "multilabel":
        return 1 / (1 + np.exp(-answers))
    powers = np.exp(answers - answers.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def scores_of(task: str, answers: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """Every metric of a task over a whole set; None where it has none, as an AUROC of one class.

    Args:
        answers: float64 [n, outputs], logits or numbers.
        targets: as `Labelled.targets` gives them.
    """
    found = {"classification": _of_classes, "multilabel": _of_labels, "regression": _of_numbers}[task](answers, targets)
    return {name: float(value) if value is not None and np.isfinite(value) else None for name, value in found.items()}


def _of_classes(answers: np.ndarray, targets: np.ndarray) -> Mapping[str, float | None]:
    from sklearn import metrics

    said, chances = answers.argmax(1), probabilities("classification", answers)
    several = len(np.unique(targets)) > 1
    one_hot = np.eye(answers.shape[1])[targets]
    if answers.shape[1] == 2:  # the second class is the positive one
        one_hot, chances = one_hot[:, 1:], chances[:, 1:]
    return {"accuracy": metrics.accuracy_score(targets, said),
            "f1": metrics.f1_score(targets, said, zero_division=0) if answers.shape[1] == 2 else None,
            "f1_macro": metrics.f1_score(targets, said, average="macro", zero_division=0),
            "mcc": metrics.matthews_corrcoef(targets, said) if several else None,
            "auroc": _auc(metrics.roc_auc_score, one_hot, chances),
            "auprc": _auc(metrics.average_precision_score, one_hot, chances)}


def _auc(metric: object, truth: np.ndarray, chances: np.ndarray) -> float | None:
    """The mean over the classes that some, but not all, sequences have."""
    assert callable(metric)
    values = [metric(truth[:, column], chances[:, column]) for column in range(truth.shape[1])
              if np.ptp(truth[:, column])]
    return float(np.mean(values)) if values else None


def _of_labels(answers: np.ndarray, targets: np.ndarray) -> Mapping[str, float | None]:
    from sklearn import metrics

    return {"f1_macro": metrics.f1_score(targets, answers > 0, average="macro", zero_division=0),
            "auroc": _auc(metrics.roc_auc_score, targets, answers),
            "auprc": _auc(metrics.average_precision_score, targets, answers)}


def _of_numbers(answers: np.ndarray, targets: np.ndarray) -> Mapping[str, float | None]:
    from scipy import stats

    values = answers[:, 0]
    squared = float(np.square(values - targets).mean())
    if not np.ptp(targets):
        return {"pearson": None, "spearman": None, "mean_squared_error": squared}
    if not np.ptp(values):  # a model that says one number of everything has found nothing, which counts in a mean
        return {"pearson": 0.0, "spearman": 0.0, "mean_squared_error": squared}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return {"pearson": stats.pearsonr(values, targets)[0], "spearman": stats.spearmanr(values, targets)[0],
                "mean_squared_error": squared}
