"""The learning rate at the steps that matter, against values worked out by hand."""

import pytest

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
