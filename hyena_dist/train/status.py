"""How far a run is: what its checkpoints, its summary and its best checkpoint are told by."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Status:
    """Of a run over all its starts."""

    step: int = 0
    """Optimizer steps done."""
    val_loss: float = math.nan
    """Of the last validation; nan: there was none."""
    val_step: int = 0
    """When `val_loss` was measured; 0: never."""
    best_val_loss: float = math.inf
    stale: int = 0
    """Validations since the one of the best loss."""
    started: float = field(default_factory=time.monotonic)
    """On the clock of this process: when the run would have started had it run without a break."""

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return time.monotonic() - self.started

    def validated(self, loss: float) -> None:
        """Note the loss of a validation at this step."""
        self.val_loss, self.val_step = loss, self.step
        self.stale = 0 if loss < self.best_val_loss else self.stale + 1
        self.best_val_loss = min(self.best_val_loss, loss)

    @property
    def val_losses(self) -> dict[str, float | None]:
        """For a checkpoint of this step: its own validation loss, where there was one, the best so far, and how many
        validations ago that was."""
        return {"val_loss": finite(self.val_loss) if self.val_step == self.step else None,
                "best_val_loss": finite(self.best_val_loss), "stale_validations": self.stale}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        val_loss, best = metadata["val_loss"], metadata["best_val_loss"]
        self.step = metadata["step"]
        self.val_loss, self.val_step = (math.nan, 0) if val_loss is None else (val_loss, self.step)
        self.best_val_loss = math.inf if best is None else best
        self.stale = metadata.get("stale_validations", 0)
        self.started = time.monotonic() - metadata["seconds"]


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
