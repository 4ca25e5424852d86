"""All of a run that a checkpoint brings back: weights and moments, the objective's place, loss scale, status."""

import logging
from typing import Any

from hyena_dist.checkpoint.directory import Checkpoint
from hyena_dist.checkpoint.format import load_checkpoint
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.versions import own_version
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import Engine
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.objective import Objective
from hyena_dist.train.run_directory import is_import
from hyena_dist.train.status import Status

logger = logging.getLogger(__name__)


class RunState:
    """Collects and restores it."""

    def __init__(self, config: Config, groups: Groups, engine: Engine, objective: Objective) -> None:
        self.engine, self.objective, self.status = engine, objective, Status()
        self._config, self._groups = config, groups

    def metadata(self) -> dict[str, Any]:
        """All but the tensors, for `CheckpointSaver.save`."""
        scaler = self.engine.loss_scaler
        return {"step": self.status.step, "identity": identity(self._config), "config": dump_config(self._config),
                "data": self.objective.state_dict(), **self.status.val_losses,
                "loss_scale": None if scaler is None else scaler.state_dict(), "seconds": self.status.seconds,
                "version": own_version()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; from one that has weights alone, at the start. Collective.

        Raises:
            UserError: it is damaged, or of another model or other data.
        """
        metadata = load_checkpoint(checkpoint, self.engine, self.objective.table, self._groups)
        if is_import(metadata):
            logger.info("starting from the weights of %s", checkpoint.path)
            return
        self.status.restore(metadata)
        self.objective.load_state_dict(metadata["data"])
        if self.engine.loss_scaler is not None:
            self.engine.loss_scaler.load_state_dict(metadata["loss_scale"] or LossScaler().state_dict())
        logger.info("resumed %s at step %d", checkpoint.path, self.status.step)
