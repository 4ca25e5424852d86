"""What becomes of a run whose steps are not finite: `train.on_nonfinite`."""

import logging
from collections.abc import Callable

from hyena_dist.config.errors import TrainingError

logger = logging.getLogger(__name__)

MOST_LOST_STEPS = 10
"""Steps that are not finite, one after the other, before a run that skips or rolls back gives up."""


class RollBack(Exception):
    """A step whose loss or gradients were not finite: go back to the last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step


class LostSteps:
    """Counts them, the same on every rank, as the numbers of a step are.

    Args:
        policy: `train.on_nonfinite`.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._lost = 0

    def finite(self) -> None:
        """A step was finite. A run that skips has then ended a row of lost steps; one that rolls back may meet the
        same step again."""
        if self._policy == "skip":
            self._lost = 0

    def saved(self) -> None:
        """A checkpoint was written: a run that rolls back has come further. One that skips saves lost steps, too."""
        if self._policy == "rollback":
            self._lost = 0

    def lose(self, step: int, what: str, last_checkpoint: Callable[[], str]) -> None:
        """Do as the policy says with a step that was not finite.

        Raises:
            TrainingError: stop, or too many of them.
            RollBack: go back.
        """
        self._lost += 1
        if self._policy == "stop" or self._lost > MOST_LOST_STEPS:
            again = f" ({self._lost} such steps)" if self._lost > 1 else ""
            raise TrainingError(f"{what}{again}; last good checkpoint: {last_checkpoint()}. Lower optim.lr or "
                                "optim.grad_clip and start afresh, resume where the cause was not the model, or set "
                                "train.on_nonfinite")
        logger.warning("%s; train.on_nonfinite=%s", what, self._policy)
        if self._policy == "rollback":
            raise RollBack(step)
