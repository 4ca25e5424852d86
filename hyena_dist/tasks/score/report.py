"""What scores are worth beside labels: AUROC and AUPRC of each, of all variants and by class, and a picture."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.score.output import Table

TRUE, FALSE = frozenset({"1", "true", "1.0", "yes"}), frozenset({"0", "false", "0.0", "no"})
OURS = {"llr_mean": -1, "llr_site": -1, "jsd": 1, "embedding_l2": 1}
"""Scores of ours that a report shows, and by which sign they are high where the label is true: an allele that the model
finds unlikely is taken for harmful."""

MOST_REASONS = 8
"""Reasons why rows have no label that are told apart, for a column may have thousands of values."""


@dataclass(frozen=True)
class Labels:
    """Of the rows of a file."""

    values: np.ndarray
    """float64 [n], 1, 0, or nan where there is no label."""
    by: list[str] | None
    """The class of each row."""
    says: str
    """What 1 and 0 are."""
    unlabelled: dict[str, int]
    """How many rows have no label, by why."""


@dataclass(frozen=True)
class Worth:
    """Of one score over some variants."""

    score: str
    sign: int
    """-1: low values were taken for positive."""
    group: str
    variants: int
    positive: int
    auroc: float
    auprc: float


def auroc(positive: np.ndarray, values: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive has the higher value, ties half; nan
    without both. bool [n], float [n], all finite."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, values)) if positive.any() and not positive.all() else float("nan")


def auprc(positive: np.ndarray, values: np.ndarray) -> float:
    """Average precision: the mean, over the positives, of the precision among the values at least as high; nan without
    both, for without a negative every order of the variants has 1."""
    from sklearn.metrics import average_precision_score

    return (float(average_precision_score(positive, values)) if positive.any() and not positive.all()
            else float("nan"))


def _column(table: Table, *names: str) -> list[str]:
    """The values of the first of some columns that is there."""
    name = next((name for name in names if name in table.names), None)
    if name is None:
        raise ConfigError(f"{table.where}: has no column {' or '.join(names)}: give one of {', '.join(table.names)}")
    place = table.names.index(name)
    return [row[place] if place < len(row) else "" for row in table.rows]


def _labels(found: Iterable[float | str], by: list[str] | None, says: str) -> Labels:
    """
    Args:
        found: of each row its label, 1 or 0, or why it has none.
    """
    of_rows = list(found)
    reasons = Counter(each for each in of_rows if isinstance(each, str))
    shown = dict(reasons.most_common(MOST_REASONS))
    if rest := reasons.total() - sum(shown.values()):
        shown["of other values"] = rest
    return Labels(np.array([np.nan if isinstance(each, str) else each for each in of_rows]), by, says, shown)


def labels_of(table: Table, column: str, by: str | None) -> Labels:
    """By a column of 1 and 0, or true and false."""
    values = [value.strip() for value in _column(table, column)]
    return _labels((1.0 if value.lower() in TRUE else 0.0 if value.lower() in FALSE else f"{column} {value!r}"
                    for value in values), None if by is None else _column(table, by), f"{column}: 1 against 0")


def brca1(table: Table, by: str | None, _stars: int) -> Labels:
    """Findlay et al. 2018: loss of function against the functional and the intermediate."""
    labels = {"LOF": 1.0, "FUNC": 0.0, "INT": 0.0}
    known = by or next((name for name in ("consequence",) if name in table.names), None)
    return _labels((labels.get(value.strip().upper(), f"class {value!r}")
                    for value in _column(table, "func_class", "func.class")),
                   None if known is None else _column(table, known), "LOF against FUNC and INT")


_STARS = {"practice_guideline": 4, "reviewed_by_expert_panel": 3,
          "criteria_provided,_multiple_submitters,_no_conflicts": 2,
          "criteria_provided,_multiple_submitters": 2, "criteria_provided,_single_submitter": 1,
          "criteria_provided,_conflicting_classifications": 1, "criteria_provided,_conflicting_interpretations": 1}
_PATHOGENIC, _BENIGN = frozenset({"pathogenic", "likely_pathogenic"}), frozenset({"benign", "likely_benign"})
_UNDECIDED = ("uncertain", "conflicting")
"""Terms that begin so leave a variant without a label, whatever stands beside them."""


def significance(value: str) -> float | None:
    """Of ClinVar's CLNSIG, as Pathogenic/Likely_pathogenic|drug_response: 1 where a term is pathogenic and none is
    benign, 0 where a term is benign and none is pathogenic, None otherwise. Terms stand between / and |, in older files
    between commas, too; those that say nothing of either, as drug_response, other or low_penetrance, do not count."""
    terms = {term.strip("_ ").lower() for term in re.split(r"[/|,]", value)}
    pathogenic, benign = not terms.isdisjoint(_PATHOGENIC), not terms.isdisjoint(_BENIGN)
    if pathogenic == benign or any(term.startswith(_UNDECIDED) for term in terms):
        return None
    return float(pathogenic)


def clinvar(table: Table, by: str | None, stars: int) -> Labels:
    """Pathogenic against benign, likely ones too, of reviews with so many stars."""
    rows = [dict(entry.partition("=")[::2] for entry in info.split(";")) for info in _column(table, "info")]
    if not any("CLNSIG" in row for row in rows):
        raise ConfigError("no row has CLNSIG in its info: score ClinVar's own VCF with --vcf")

    def label(row: Mapping[str, str]) -> float | str:
        found = significance(row.get("CLNSIG", ""))
        if found is None:
            return f"CLNSIG {row['CLNSIG']}" if "CLNSIG" in row else "without CLNSIG"
        return found if _STARS.get(row.get("CLNREVSTAT", ""), 0) >= stars else f"reviewed with fewer stars than {stars}"
    classes = (_column(table, by) if by else
               [row.get("MC", "").partition(",")[0].partition("|")[2] or "no consequence given" for row in rows])
    return _labels(map(label, rows), classes, f"pathogenic against benign, {stars} stars or more")


def traitgym(table: Table, by: str | None, _stars: int) -> Labels:
    """Causal variants against matched ones."""
    known = by or next((name for name in ("consequence", "tissue") if name in table.names), None)
    return replace(labels_of(table, "label", known), says="causal against matched controls")


PRESETS: dict[str, Callable[[Table, str | None, int], Labels]] = {
    "brca1": brca1, "clinvar": clinvar, "traitgym": traitgym}


def numbers(table: Table, column: str) -> np.ndarray:
    """float64 [n]; nan where the column has no number."""
    found = np.full(len(table.rows), np.nan)
    for place, value in enumerate(_column(table, column)):
        try:
            found[place] = float(value)
        except ValueError:
            continue
    return np.where(np.isfinite(found), found, np.nan)


def _columns(table: Table, others: Sequence[str]) -> dict[str, np.ndarray]:
    """`numbers` of our scores and of other columns, by name."""
    return {name: numbers(table, name) for name in (*OURS, *others)}


def _compared(labels: Labels, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [n], which rows have a label and all of the scores, so that each score is judged on the same rows."""
    return ~np.isnan(labels.values) & ~np.isnan(np.stack(list(columns.values()))).any(0)


def left_out(table: Table, labels: Labels, others: Sequence[str]) -> dict[str, int]:
    """How many rows have a label and are compared in nothing, by why: the outcome of those without any score of ours,
    of others the first column in which they have no number."""
    columns, outcomes = _columns(table, others), _column(table, "outcome")
    found = Counter[str]()
    for row in np.flatnonzero(~np.isnan(labels.values) & ~_compared(labels, columns)):
        lacking = [name for name, values in columns.items() if np.isnan(values[row])]
        found[outcomes[row] if outcomes[row] != "scored" and set(OURS) <= set(lacking)
              else f"no number in {lacking[0]}"] += 1
    return dict(found.most_common())


def _counted(counts: Mapping[str, int]) -> str:
    """Counts by cause, for a sentence."""
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.items())


def outcomes(table: Table) -> str:
    """How many rows have which outcome, in words."""
    found = _column(table, "outcome")
    return f"{len(found):,} alleles: {_counted(dict(Counter(found).most_common()))}"


def remarks(table: Table, labels: Labels, others: Sequence[str]) -> list[str]:
    """What is to be known of the rows that are compared, and of those that are not."""
    found, without = [], left_out(table, labels, others)
    if labels.unlabelled:
        found.append(f"{sum(labels.unlabelled.values()):,} rows have no label: {_counted(labels.unlabelled)}")
    if without:
        found.append(f"{sum(without.values()):,} rows with a label are left out of every number: {_counted(without)}")
    compared = _compared(labels, _columns(table, others))
    if again := int((compared & (np.array(_column(table, "outcome")) == "duplicate")).sum()):
        found.append(f"{again:,} of the rows below are of variants that have a row before them, and count again")
    return found


def worths(table: Table, labels: Labels, others: Sequence[str]) -> list[Worth]:
    """Of our scores, and of other columns, over the variants that have a label and all of the scores: the same for
    each. Of another column the sign is that by which its AUROC is at least 1/2, and is shown. A class whose labelled
    rows are all left out has rows of 0 variants.

    Raises:
        ConfigError: no such column, or no variant with each of the two labels.
    """
    columns = _columns(table, others)
    known, positive = _compared(labels, columns), labels.values == 1
    if not (known & positive).any() or not (known & ~positive).any():
        without = _counted(left_out(table, labels, others))
        raise ConfigError(f"{int((known & positive).sum())} variants with all scores are positive and "
                          f"{int((known & ~positive).sum())} negative ({labels.says}"
                          + (f"; left out: {without}" if without else "") + "): give a label, and scores, by "
                          "which there are both")
    groups = {"all": known}
    if labels.by is not None:
        of_row = np.array(labels.by, dtype=object)
        named = sorted(set(of_row[~np.isnan(labels.values)]))
        groups |= {name or "(none)": known & (of_row == name) for name in named}
    found = []
    for name, values in columns.items():
        sign = OURS.get(name) or (1 if auroc(positive[known], values[known]) >= 0.5 else -1)
        found += [Worth(name, sign, group, int(chosen.sum()), int((chosen & positive).sum()),
                        auroc(positive[chosen], sign * values[chosen]), auprc(positive[chosen], sign * values[chosen]))
                  for group, chosen in groups.items()]
    return found


def draw(table: Table, labels: Labels, found: Sequence[Worth], path: Path, title: str) -> None:
    """Draw the ROC curve of each score over all variants."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from sklearn.metrics import roc_curve

    whole = [worth for worth in found if worth.group == "all"]
    columns = {worth.score: worth.sign * numbers(table, worth.score) for worth in whole}
    known = _compared(labels, columns)
    positive = labels.values[known] == 1
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    for worth in whole:
        false, true, _ = roc_curve(positive, columns[worth.score][known])
        axes.plot(false, true,
                  label=f"{'-' if worth.sign < 0 else ''}{worth.score}  {worth.auroc:.3f}")
    axes.plot([0, 1], [0, 1], color="lightgrey", linestyle="--")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=title, aspect="equal")
    axes.title.set_fontsize(9)
    axes.legend(title="AUROC", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
