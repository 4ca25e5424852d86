"""All of a run that a checkpoint brings back: weights and moments, the objective's place, loss scale, status."""

import logging
from typing import Any

from hyena_dist.checkpoint.directory import Checkpoint
from hyena_dist.checkpoint.format import load_checkpoint
from hyena_dist.config.identity import identity, measured_alike
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.versions import own_version
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import Engine
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.history import Start
from hyena_dist.train.objective import Objective
from hyena_dist.train.status import Status

logger = logging.getLogger(__name__)


class RunState:
    """Collects and restores it."""

    def __init__(self, config: Config, groups: Groups, engine: Engine, objective: Objective) -> None:
        self.engine, self.objective, self.status = engine, objective, Status()
        self._config, self._groups = config, groups

    def metadata(self) -> dict[str, Any]:
        """All but the tensors, for `CheckpointSaver.save`. Collective."""
        scaler = self.engine.loss_scaler
        return {"step": self.status.step, "identity": identity(self._config), "config": dump_config(self._config),
                "objective": self.objective.name, "frozen": sorted(self.engine.frozen),
                "data": self.objective.state_dict(), **self.status.val_losses,
                "loss_scale": None if scaler is None else scaler.state_dict(), "seconds": self.status.seconds,
                "version": own_version()}

    def load(self, checkpoint: Checkpoint, *, weights_alone: bool) -> dict[str, Any]:
        """Load weights, and with them the moments unless they are wanted alone; returns the metadata. Collective.

        Raises:
            UserError: as of `restore`.
        """
        return load_checkpoint(checkpoint, self.engine, self.objective.table, self._groups, new_optimizer=weights_alone)

    def restore(self, start: Start) -> None:
        """Go on from a checkpoint; with its weights alone, at the start. Collective.

        Raises:
            UserError: it is damaged, or of another model or other data.
        """
        weights = start.takes == "weights"
        metadata = self.load(start.checkpoint, weights_alone=weights)
        logger.info("going on from the %s of %s, at step %d", start.takes, start.checkpoint.path, start.step)
        if weights:
            return
        # A loss over other windows is not this run's, nor a best one whose checkpoint is in another run's directory.
        alike = measured_alike(metadata["identity"], identity(self._config))
        val_loss = metadata["val_loss"] if alike else None
        best = metadata["best_val_loss"] if alike and start.own else val_loss
        self.status.restore({**metadata, "val_loss": val_loss, "best_val_loss": best})
        self.objective.load_state_dict(metadata["data"])
        if self.engine.loss_scaler is not None:
            self.engine.loss_scaler.load_state_dict(metadata["loss_scale"] or LossScaler().state_dict())
