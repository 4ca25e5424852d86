"""Commands that a report is made of, run one after the other."""

import logging
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.signals import EXIT_REQUEUE

ROOT = Path(__file__).parents[1]

logger = logging.getLogger(__name__)


def run_all(commands: Iterable[Sequence[str]]) -> None:
    """Run every command; each goes on, or ends at once, where an earlier call has been through it.

    Raises:
        ConfigError: one has failed, or was stopped; the same call goes on.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for command in commands:
        logger.info("running %s", shlex.join(command))
        status = subprocess.run(command, env=environment, check=False).returncode
        if status == EXIT_REQUEUE:
            raise ConfigError("stopped: the same command goes on")
        if status:
            raise ConfigError(f"{shlex.join(command)}: ended with status {status}: mend what it says, and give the "
                              "same command")
