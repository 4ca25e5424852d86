"""Where a run lives: who may write there, and the checkpoint that it goes on from."""

import json
import logging
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.checkpoint_directory import find_latest, read_resumable
from hyena_dist.train.files import write_whole
from hyena_dist.train.run_lock import RunLock
from hyena_dist.train.signals import clear_requeue

logger = logging.getLogger(__name__)


class RunDirectory:
    """`train.run_dir` of a run, made and locked by its first rank.

    Args:
        config: of the run.
        first: whether this is the first rank, which alone writes.
    """

    def __init__(self, config: Config, *, first: bool) -> None:
        self.path = Path(config.train.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self._config, self._first = config, first
        self._lock: RunLock | None = None

    def claim(self) -> None:
        """Make the directory and lock it, on the first rank.

        Raises:
            ConfigError: it cannot be made, or another run has it.
        """
        if not self._first:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"train.run_dir={self.path}: no such directory can be made ({error.strerror}): choose "
                              "another") from error
        self._lock = RunLock(self.path)

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()

    def start_from(self, latest: Path | None) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from and its metadata, by `train.resume`; None for a fresh start.

        Args:
            latest: the newest whole checkpoint in here, as the first rank sees it.

        Raises:
            UserError: it was saved with another configuration, is not whole, or would lose newer ones.
        """
        choice = self._config.train.resume
        path = Path(choice)
        if choice not in ("auto", "none") and latest is not None and path.resolve().parent != latest.resolve().parent:
            logger.info("train.run_dir=%s has a checkpoint of its own: going on from %s, not from train.resume=%s",
                        self.path, latest.name, choice)
            choice = "auto"
        if choice == "none" and latest is not None:
            raise ConfigError(f"train.run_dir={self.path} holds a run already ({latest.name}): choose another "
                              "directory, or resume it with train.resume=auto")
        if choice in ("auto", "none"):
            if latest is None:
                return None
            path = latest
        metadata = read_resumable(path)
        saved, current = metadata["identity"], json.loads(json.dumps(identity(self._config)))
        if is_import(metadata):  # weights without a run: only the model must be the same
            current = {key: value for key, value in current.items() if key in saved}
        if changed := differences(saved, current):
            raise ConfigError(f"{path} cannot be resumed with another configuration: {'; '.join(changed)}: set "
                              "these keys as saved, or start afresh in another train.run_dir")
        if latest is not None and latest != path and read_resumable(latest)["step"] > metadata["step"]:
            # Its next checkpoints would be older than those, which the run would resume from and keep instead.
            raise ConfigError(f"train.resume={path} is older than {latest}: delete the newer ones, resume that one "
                              "with train.resume=auto, or choose another train.run_dir")
        return path, metadata

    def begin(self) -> None:
        """Write config.yaml, and forget that an earlier start was to be requeued; on the first rank.

        Raises:
            OSError: they could not be written.
        """
        if self._first:
            write_whole(self.path / "config.yaml", lambda path: path.write_text(dump_config(self._config)))
            clear_requeue(self.path)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, on the first rank; None on the others, which need not see the directory."""
        return find_latest(self.checkpoints) if self._first else None

    def write_summary(self, groups: Groups, **numbers: float | None) -> None:
        """Write summary.json: the numbers, and how the run was laid out.

        Raises:
            OSError: it could not be written.
        """
        engine = self._config.engine
        layout = {"data": groups.data.size, "tensor": groups.tensor.size, "context": groups.context.size,
                  "engine": engine.name, "zero_stage": engine.zero_stage if engine.name == "deepspeed" else None,
                  "precision": self._config.train.precision}
        text = json.dumps({**numbers, "world_size": groups.world.size, "layout": layout}, indent=1) + "\n"
        write_whole(self.path / "summary.json", lambda path: path.write_text(text))


def is_import(metadata: dict[str, Any]) -> bool:
    """Whether a checkpoint holds weights that no run of this program trained: it has no place in any data."""
    return metadata["data"] is None
