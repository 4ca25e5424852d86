"""The rows of a run sent to Weights & Biases (`train.wandb`), by its own library, which is an extra."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError

FINISH_SECONDS = 300.0
"""In which W&B may send the rest at the end of a run: less than the time-out of a collective, in which the other ranks
of a fine-tuning wait for its next run. What it has not sent by then is on the disk."""


def check_installed(project: str) -> None:
    """Raises ConfigError: `train.wandb` names a project, and the library is not there."""
    if project and find_spec("wandb") is None:
        raise ConfigError(f"train.wandb={project}: wandb is missing: install it with pip install 'hyena-dist[wandb]', "
                          "or leave train.wandb out")


class WandbRun:
    """One start of a run, a W&B run of its own in the group of the run directory's name; `step` is its axis, so that
    steps which come again after a resume are drawn where they belong.

    Raises:
        ConfigError: W&B refuses to start: no login, no network, a name that it does not take.
    """

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        check_installed(project)
        import wandb

        try:
            self._run = wandb.init(project=project, name=run_dir.name, group=run_dir.name, dir=str(run_dir),
                                   config=dict(settings), settings=wandb.Settings(console="off",
                                                                                finish_timeout=FINISH_SECONDS))
        except (wandb.Error, ValueError, OSError) as error:
            raise ConfigError(f"train.wandb={project}: W&B does not start ({error}): log in with `wandb login`, set "
                              "WANDB_MODE=offline, or leave train.wandb out") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, split: str, values: Mapping[str, float], *, step: int) -> None:
        """Send values of a step; W&B's own process does it, and keeps them while there is no network."""
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Wait until all is sent, or W&B has said that it gives up and how the rest is sent later (`wandb sync`)."""
        self._run.finish()
