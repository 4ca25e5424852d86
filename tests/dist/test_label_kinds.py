"""Regressions and several labels of a sequence, from a table to a result: they learn, their metrics are those of the
whole test split, and what is logged is a loss and no perplexity. A seed that another process has is not entered."""

import csv
import json
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.runtime.run_lock import RunLock
from hyena_dist.train.metrics import read_rows
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import assert_it_says_what_it_was_judged_by, config_of, run


def table(directory: Path, task: str) -> Path:
    """Sequences with as much G and C as their number says, or with runs of A and of T as their labels say."""
    directory.mkdir()
    rng = np.random.default_rng(1)
    for name, count in (("train", 96), ("dev", 24), ("test", 24)):
        lines = ["sequence,label"]
        for _ in range(count):
            if task == "regression":
                share = rng.random() / 2
                bases = "".join(rng.choice(list("ACGT"), 48, p=[0.5 - share, share, share, 0.5 - share]))
                label = f"{100 + 40 * sum(base in 'GC' for base in bases) / 48:.3f}"
            else:
                wanted = [bool(rng.integers(2)), bool(rng.integers(2))]
                odds = np.array([4.0 if wanted[0] else 0.2, 1, 1, 4.0 if wanted[1] else 0.2])
                bases = "".join(rng.choice(list("ACGT"), 48, p=odds / odds.sum()))
                label = ";".join(word for word, there in zip(("rich_in_a", "rich_in_t"), wanted, strict=True) if there)
            lines.append(f"{bases},{label or '-'}")
        (directory / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def config(directory: Path, task: str) -> Config:
    found = config_of(directory, f"run-{task}", 1)
    return replace(found, finetune=FinetuneSection(table=str(directory / task), task=task),
                   train=replace(found.train, steps=60, eval_every=20))


def _one_rank(directory: Path) -> dict[str, Any]:
    groups, said, found = init_groups(), [], {}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hyena_dist").addHandler(handler)
    logging.getLogger("hyena_dist").setLevel(logging.INFO)
    for task in ("regression", "multilabel"):
        run(config(directory, task), groups=groups)
    found["said"] = said
    (directory / "run-multilabel/seed-0/result.json").unlink()
    found["locked"] = _locked(config(directory, "multilabel"), groups)
    return found


def _locked(wanted: Config, groups: Groups) -> str:
    """What is said of a seed's directory that another one has."""
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = RunLock(Path(wanted.train.run_dir, "seed-0"))
        os.write(tell, b"1")
        time.sleep(600)
        lock.release()
        os._exit(0)
    os.read(ready, 1)
    try:
        run(wanted, groups=groups)
    except UserError as error:
        return str(error)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    return ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("labels")
    for task in ("regression", "multilabel"):
        table(directory / task, task)
    return directory, run_distributed(_one_rank, 1, directory)[0]


def test_a_regression_learns_in_the_units_of_its_labels(runs: Any) -> None:
    directory = runs[0]
    result = json.loads((directory / "run-regression/result.json").read_text("utf-8"))
    metrics = {name: found["mean"] for name, found in result["metrics"].items()}
    assert metrics["pearson"] > 0.9
    assert metrics["spearman"] > 0.9
    with (directory / "run-regression/seed-0/predictions.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    labels, said = (np.array([float(row[key]) for row in rows]) for key in ("label", "predicted"))
    assert np.corrcoef(labels, said)[0, 1] == pytest.approx(metrics["pearson"], abs=1e-4)
    assert np.square(labels - said).mean() == pytest.approx(metrics["mean_squared_error"], abs=1e-3)
    assert metrics["mean_squared_error"] < 0.3 * labels.var(), "the control: the mean of all would be at 1"


def test_several_labels_are_each_learnt(runs: Any) -> None:
    directory = runs[0]
    result = json.loads((directory / "run-multilabel/result.json").read_text("utf-8"))
    assert result["classes"] == ["rich_in_a", "rich_in_t"]
    assert result["metrics"]["auroc"]["mean"] > 0.85
    assert result["metrics"]["f1_macro"]["mean"] > 0.7
    with (directory / "run-multilabel/seed-0/predictions.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["label"] for row in rows} == {"-", "rich_in_a", "rich_in_t", "rich_in_a;rich_in_t"}
    for row in rows:
        words = [name for name in result["classes"] if float(row[name]) > 0.5]
        assert row["predicted"] == (";".join(words) or "-")


def test_of_its_own_test_split_a_trained_regression_says_what_it_was_judged_by(runs: Any, tmp_path: Path) -> None:
    assert_it_says_what_it_was_judged_by(runs[0] / "run-regression", runs[0] / "regression/test.csv", tmp_path)


def test_what_is_logged_of_labels_is_a_loss(runs: Any) -> None:
    directory, found = runs
    lines = [line for line in found["said"] if "val " in line or "validation " in line]
    assert any("val loss" in line for line in lines)
    assert any("validation loss" in line for line in lines)
    assert not any("perplexity" in line for line in lines)
    for task in ("regression", "multilabel"):
        rows = read_rows(directory / f"run-{task}/seed-0/metrics.jsonl")
        assert all(row.perplexity is None for row in rows)
        summary = json.loads((directory / f"run-{task}/seed-0/summary.json").read_text("utf-8"))
        assert summary["best_val_loss"] == min(row.loss for row in rows if row.split == "val")
        assert not [key for key in summary if "perplexity" in key]


def test_a_seed_of_another_process_is_not_entered(runs: Any) -> None:
    assert "seed-0" in runs[1]["locked"]
