"""The loss scale of fp16. Ours, because DeepSpeed's own scalers fail at some stages: see `deepspeed_config.py`."""

from dataclasses import dataclass

LOWEST, HIGHEST = 1.0, 2.0**24


@dataclass
class LossScaler:
    """A dynamic loss scale: halved when gradients are not finite, doubled after `growth_interval` good steps in a row.

    Every rank sees the same norms and so has the same scale. It is a power of two: scaling rounds nothing.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, *, finite: bool) -> bool:
        """Note a step's gradients. Returns whether the scale was lowered, so that the next step may do better."""
        if not finite:
            self.good_steps = 0
            lowered = self.scale > LOWEST
            self.scale = max(self.scale / 2, LOWEST)
            return lowered
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = 0
            self.scale = min(self.scale * 2, HIGHEST)
        return False

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what `state_dict` gave."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
