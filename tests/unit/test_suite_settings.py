"""What a suite sets for each run: the grid, warm-up and validations by the number of sequences, and what a command says
otherwise; and the row that is made of the results."""

from typing import Any

import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.suites import SUITES
from hyena_dist.tasks.suites.prepare import Prepared
from hyena_dist.tasks.suites.settings import Point, arguments_of, changes_of, points_of
from hyena_dist.tasks.suites.table import markdown, row_of

GB, GUE = SUITES["caduceus-gb"], SUITES["gue-dnabert2"]


def of(task: str, changes: dict[str, str], sizes: dict[str, int]) -> dict[str, str]:
    suite = GB if task.startswith("human") else GUE
    prepared = Prepared(sizes, 100, ("0", "1"), ())
    point = points_of(suite, changes)[0]
    return dict(argument.split("=", 1) for argument in arguments_of(suite, suite.task(task), point, changes, prepared))


def test_the_grid_is_every_setting_but_of_keys_that_the_command_sets() -> None:
    assert [point.name for point in points_of(GB, {})] == [
        "rc-none_global_batch_size-128", "rc-none_global_batch_size-256", "rc-augment_global_batch_size-128",
        "rc-augment_global_batch_size-256"]
    assert [point.name for point in points_of(GB, {"finetune.rc": "none"})] == [
        "global_batch_size-128", "global_batch_size-256"]
    assert [point.name for point in points_of(GUE, {"optim.lr": "1"})] == ["run"]
    assert [point.name for point in points_of(GUE, {})] == ["lr-3e-05", "lr-0.0006"]


def test_steps_follow_from_the_sequences() -> None:
    found = of("human_enhancers_cohn", {}, {"train": 14222, "test": 10})  # 90 % of them train: 100 steps an epoch
    assert (found["train.eval_every"], found["optim.warmup_steps"]) == ("100", "10")
    assert (found["train.seed"], found["finetune.seeds"], found["finetune.epochs"]) == ("1", "5", "10")
    found = of("mouse/0", {}, {"train": 640, "valid": 80, "test": 80})
    assert (found["train.eval_every"], found["optim.warmup_steps"], found["finetune.epochs"]) == ("20", "5", "5")
    found = of("mouse/0", {"train.steps": "40"}, {"train": 640, "valid": 80})
    assert "finetune.epochs" not in found, "the steps are the command's"
    assert (found["train.steps"], found["train.eval_every"]) == ("40", "20")
    found = of("mouse/0", {"optim.warmup_steps": "3"}, {"train": 640, "valid": 80})
    assert found["optim.warmup_steps"] == "3"
    assert of("mouse/0", {"finetune.epochs": "1"}, {"train": 20, "valid": 80})["optim.warmup_steps"] == "0", \
        "less than the one step that there is"


@pytest.mark.parametrize(("argument", "said"), [
    ("lr=1", "write section.key=value"), ("optim.lr", "write section.key=value"),
    ("finetune.table=x", "the suite sets finetune.table"), ("train.run_dir=x", "the suite sets train.run_dir")])
def test_keys_that_cannot_be_set(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changes_of([argument])


def result(valid: list[float | None], test: float, collapsed: list[int] | None = None) -> dict[str, Any]:
    return {"judged_on": "test", "notes": [], "collapsed_seeds": collapsed or [],
            "metrics": {"mcc": {"mean": test, "deviation": .02, "lowest": test - .03, "highest": test + .03,
                                "seeds": 3}},
            "baselines": {"kmers": {"mcc": {"mean": 0.25}}},
            "seeds": [{"scores": {"valid": {"mcc": value}}} for value in valid]}


def test_validation_chooses_and_test_is_only_reported() -> None:
    task = GUE.task("mouse/0")
    points = [Point("a", {"optim.lr": 3e-5}), Point("b", {"optim.lr": 6e-4})]
    row = row_of(GUE, task, [(points[0], result([.5, .6, .7], .1, [2])), (points[1], result([.4, .5, .6], .9))])
    assert (row.ours["mean"], row.setting, row.collapsed) == (.1, "optim.lr=3e-05", [2]), \
        "though the other tests better"
    row_none = row_of(GUE, task, [(points[0], result([.9, None], .1)), (points[1], result([.4, .5], .9))])
    assert row_none.setting == "optim.lr=0.0006", "a seed without a value is worse than any"
    text = markdown(GUE, "m", {}, [row])
    assert "| mouse/0 | mcc | 0.100 ± 0.020 | 0.070 to 0.130 | 3 | 0.250 | 0.568 |" in text
    assert "the model of seeds 2 **collapsed**" in text
    assert "Changed by the command" not in text
    assert "DNABERT-2 (117M)*" in text
