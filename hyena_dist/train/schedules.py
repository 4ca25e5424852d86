"""The learning rate as a pure function of the step: nothing to save, and a skipped step does not shift it."""

import math

from hyena_dist.config.checks import cooldown_steps
from hyena_dist.config.sections.optim import OptimSection


def learning_rate(step: int, *, optim: OptimSection, steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `steps` in all.

    Every schedule (`optim.schedule`) begins with the same linear warm-up, from lr / warmup_steps at step 0 to lr at
    step warmup_steps - 1. Then

    cosine: half a cosine down to min_lr at the last step, `steps - 1`. The horizon is the real number of steps: the
        published schedule ran over another one.
    wsd (warm-up, stable, decay): lr, until the last `cooldown_steps` steps. With p the share of these that is done,
        1 / n at the first of them and 1 at the last, the rate is min_lr + (lr - min_lr) * (1 - sqrt(p)), so that the
        last step has min_lr. Before the cool-down it does not depend on `steps`, so a run can be prolonged, or its
        checkpoints branched into cool-downs of their own, and no step of the past would have been another.
    constant: lr.

    Raises:
        ValueError: no step of the run.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be at least 0 and less than the run's {steps} steps, got {step}")
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        cooldown = cooldown_steps(optim, steps)
        progress = max(step + 1 - (steps - cooldown), 0) / cooldown
        return optim.lr - (optim.lr - (optim.min_lr or 0.0)) * math.sqrt(progress)
    min_lr = 0.1 * optim.lr if optim.min_lr is None else optim.min_lr
    peak = max(optim.warmup_steps - 1, 0)  # the step at which the learning rate is lr
    progress = (step - peak) / max(steps - 1 - peak, 1)
    return optim.lr - (optim.lr - min_lr) * 0.5 * (1 - math.cos(math.pi * progress))
