"""The optimizer and its learning rate."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import not_negative, one_of, positive, probability


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW, its learning rate after a linear warm-up. As published, all but the filters' weights decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """What follows the warm-up. cosine: down to min_lr over all of train.steps; constant: lr; wsd (warm-up, stable,
    decay): lr, then a cool-down of 1 - sqrt to min_lr. A constant run has no end of its own, nor has wsd before its
    cool-down: their checkpoints can be branched into cool-downs (docs/training.md)."""
    cooldown: float | None = None
    """Of wsd, how long its cool-down is: below 1 a share of train.steps, from 1 on a number of steps; null: 0.2."""
    min_lr: float | None = None
    """Learning rate at the last step of cosine and wsd; null: 0.1 * lr of cosine, and 0 of wsd, as the literature has
    both."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every weight outside the implicit filters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        positive("optim", lr=self.lr, eps=self.eps)
        one_of("optim", "schedule", self.schedule, ("cosine", "wsd", "constant"))
        self._check_cooldown()
        not_negative("optim", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, grad_clip=self.grad_clip)
        probability("optim", **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        if self.min_lr is not None:
            not_negative("optim", min_lr=self.min_lr)
            if self.min_lr > self.lr:
                raise ValueError(f"optim.min_lr ({self.min_lr}) must not exceed optim.lr ({self.lr})")
        if self.min_lr is not None and self.schedule == "constant":
            raise ValueError(f"optim.min_lr ({self.min_lr}) is never reached by optim.schedule=constant: leave it out, "
                             "or set it to null")

    def _check_cooldown(self) -> None:
        if self.cooldown is None:
            return
        positive("optim", cooldown=self.cooldown)
        if self.schedule != "wsd":
            raise ValueError(f"optim.cooldown ({self.cooldown:g}) is of optim.schedule=wsd only, and the schedule is "
                             f"{self.schedule}: set optim.schedule=wsd, or leave the cool-down out")
        if self.cooldown >= 1 and self.cooldown != int(self.cooldown):
            raise ValueError(f"optim.cooldown ({self.cooldown}) must be a share of the run below 1, or a whole number "
                             "of steps")
