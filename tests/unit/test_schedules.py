"""The learning rate at the steps that matter, against values worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.schedules import curves, draw
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.train.schedules import learning_rate

OPTIM = OptimSection(lr=6e-4, warmup_steps=10)
STEPS = 110


def lr(step: int, optim: OptimSection = OPTIM, steps: int = STEPS) -> float:
    return learning_rate(step, optim=optim, steps=steps)


def test_warm_up_is_linear_and_never_zero() -> None:
    assert lr(0) == pytest.approx(6e-5)
    assert lr(4) == pytest.approx(3e-4)
    assert lr(9) == pytest.approx(6e-4)


def test_cosine_ends_at_the_last_of_the_real_steps() -> None:
    assert lr(STEPS - 1) == pytest.approx(6e-5)
    assert lr(59) == pytest.approx((6e-4 + 6e-5) / 2)  # half-way from step 9 to step 109
    rates = [lr(step) for step in range(9, STEPS)]
    assert rates == sorted(rates, reverse=True)


def test_min_lr_is_a_key() -> None:
    assert lr(STEPS - 1, OptimSection(lr=6e-4, min_lr=0.0)) == pytest.approx(0.0)
    assert lr(STEPS - 1, OptimSection(lr=6e-4, min_lr=6e-4)) == lr(0, OptimSection(lr=6e-4, min_lr=6e-4))


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert lr(0, OptimSection(lr=6e-4)) == 6e-4


def test_a_run_shorter_than_its_warm_up_and_of_one_step() -> None:
    assert lr(4, steps=5) == pytest.approx(3e-4)
    assert lr(0, OptimSection(lr=6e-4), steps=1) == 6e-4


@pytest.mark.parametrize("step", [-1, STEPS])
def test_a_step_outside_the_run_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="less than the run's 110 steps"):
        lr(step)


def wsd(cooldown: float | None, *, steps: int = STEPS, min_lr: float | None = None) -> list[float]:
    optim = OptimSection(lr=6e-4, warmup_steps=10, schedule="wsd", cooldown=cooldown, min_lr=min_lr)
    return [lr(step, optim, steps) for step in range(steps)]


def test_wsd_is_stable_and_then_one_minus_the_root_of_the_progress() -> None:
    rates = wsd(16)
    assert rates[:10] == [lr(step) for step in range(10)], "the warm-up is that of every schedule"
    assert rates[9:94] == [6e-4] * 85
    assert rates[94] == pytest.approx(6e-4 * 0.75)  # 1 of 16 steps, its root 1/4
    assert rates[97] == pytest.approx(6e-4 * 0.5)  # 4 of 16
    assert rates[102] == pytest.approx(6e-4 * 0.25)  # 9 of 16
    assert rates[109] == 0.0
    to_floor = wsd(16, min_lr=1e-4)
    assert to_floor[97] == pytest.approx((6e-4 + 1e-4) / 2)
    assert to_floor[109] == pytest.approx(1e-4)


@pytest.mark.parametrize(("cooldown", "steps"), [(None, 22), (0.2, 22), (22, 22), (0.5, 55), (0.001, 1), (1, 1),
                                                 (100, 100)])
def test_a_cool_down_is_a_share_of_the_run_or_a_number_of_steps(cooldown: float | None, steps: int) -> None:
    assert sum(rate < 6e-4 for rate in wsd(cooldown)[10:]) == steps


def test_a_cool_down_that_is_branched_off_has_the_same_steps_before_it() -> None:
    """The rates of a run are those of the longer run it was branched from; a cosine's are not."""
    long, short = wsd(20, steps=200), wsd(8, steps=60)
    assert short[:52] == long[:52]
    assert all(a < b for a, b in zip(short[52:], long[52:60], strict=True))
    assert lr(30, steps=60) < lr(30, steps=200), "control"


def test_constant_is_constant() -> None:
    optim = OptimSection(lr=6e-4, warmup_steps=10, schedule="constant")
    assert [lr(step, optim) for step in range(STEPS)] == [lr(step) for step in range(10)] + [6e-4] * 100


@pytest.mark.parametrize(("keys", "message"), [
    ({"schedule": "linear"}, "optim.schedule must be one of cosine, wsd, constant, got 'linear'"),
    ({"cooldown": 10}, r"optim.cooldown \(10\) is of optim.schedule=wsd only, and the schedule is cosine"),
    ({"cooldown": 0.1, "schedule": "constant"}, "the schedule is constant: set optim.schedule=wsd"),
    ({"cooldown": 1.5, "schedule": "wsd"}, "a share of the run below 1, or a whole number of steps"),
    ({"cooldown": 0, "schedule": "wsd"}, "optim.cooldown must be greater than 0"),
    ({"cooldown": float("nan"), "schedule": "wsd"}, "optim.cooldown must be greater than 0"),
    ({"min_lr": 1e-5, "schedule": "constant"}, "is never reached by optim.schedule=constant"),
])
def test_keys_of_another_schedule_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimSection(**keys)


def test_the_picture_shows_what_the_docs_say(tmp_path: Path) -> None:
    found = curves()
    assert {name: (min(rates), max(rates)) for name, rates in found.items()} == {
        "cosine": (0, 9999), "constant": (0, 9999), "wsd": (0, 9999), "wsd, branched at 4,000": (4000, 4999),
        "wsd, branched at 7,000": (7000, 7999)}
    assert {name: rates[max(rates)] for name, rates in found.items()} == {
        "cosine": pytest.approx(6e-5), "constant": 6e-4, "wsd": 0.0, "wsd, branched at 4,000": 0.0,
        "wsd, branched at 7,000": 0.0}
    assert all(found[name][499] == 6e-4 for name in ("cosine", "constant", "wsd"))
    assert (found["wsd"][7999], found["wsd"][8499]) == (6e-4, pytest.approx(3e-4)), "a quarter of 2000 steps: half"
    assert found["wsd, branched at 4,000"][4249] == pytest.approx(3e-4)
    draw(tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")
