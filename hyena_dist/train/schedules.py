"""The learning rate as a pure function of the step: nothing to save, and a skipped step does not shift it."""

import math

from hyena_dist.config.sections.optim import OptimSection


def learning_rate(step: int, *, optim: OptimSection, steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `steps` in all.

    Linear from lr / warmup_steps at step 0 to lr at step warmup_steps - 1, then a cosine down to min_lr at the last
    step, `steps - 1`. The horizon is the real number of steps: the published schedule ran over another one.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be at least 0 and less than the run's {steps} steps, got {step}")
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    min_lr = 0.1 * optim.lr if optim.min_lr is None else optim.min_lr
    peak = max(optim.warmup_steps - 1, 0)  # the step at which the learning rate is lr
    progress = (step - peak) / max(steps - 1 - peak, 1)
    return optim.lr - (optim.lr - min_lr) * 0.5 * (1 - math.cos(math.pi * progress))
