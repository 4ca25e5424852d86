"""The optimizer and its learning rate."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import not_negative, positive, probability


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW with linear warm-up and cosine decay. As published, all but the filters' weights decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the last step; null: 0.1 * lr."""
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
        not_negative("optim", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, grad_clip=self.grad_clip)
        probability("optim", **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        if self.min_lr is not None:
            not_negative("optim", min_lr=self.min_lr)
            if self.min_lr > self.lr:
                raise ValueError(f"optim.min_lr ({self.min_lr}) must not exceed optim.lr ({self.lr})")
