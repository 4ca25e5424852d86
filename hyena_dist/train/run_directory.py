"""Where a run lives: who may write there, and the checkpoint that it goes on from."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from hyena_dist.checkpoint.directory import Checkpoint, find_latest, open_checkpoint
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.plain import open_regular
from hyena_dist.config.schema import Config
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.files import write_whole
from hyena_dist.runtime.requeue import take_requeue
from hyena_dist.runtime.run_lock import RunLock

SAVED = "last_checkpoint"
"""Name of the file that names the newest checkpoint that was ever written here."""
SUMMARY = "summary.json"

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
        self.passed_over: set[Path] = set()
        """Checkpoints in here that were found damaged."""
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

    def start_from(self, latest: Checkpoint | None, groups: Groups) -> Checkpoint | None:
        """The checkpoint to go on from, by `train.resume`; None for a fresh start. Collective.

        Args:
            latest: the newest sound checkpoint in here.

        Raises:
            UserError: on every rank. It was saved with another configuration, is not sound, or would lose newer ones;
                or the run had checkpoints and has none any more.
        """
        choice = self._config.train.resume
        if latest is None and choice != "none":
            agree(self._refuse_lost, groups)
        if choice not in ("auto", "none"):
            path = Path(choice)
            if latest is None or path.resolve().parent == latest.path.resolve().parent:
                chosen = open_checkpoint(path, groups)
                agree(lambda: self._check(chosen, latest), groups)
                return chosen
            logger.info("train.run_dir=%s has a checkpoint of its own: going on from %s, not from train.resume=%s",
                        self.path, latest.path.name, choice)
        if latest is None:
            return None
        if choice == "none":
            raise ConfigError(f"train.run_dir={self.path} holds a run already ({latest.path.name}): choose another "
                              "directory, or resume it with train.resume=auto")
        agree(lambda: self._check(latest, latest), groups)
        return latest

    def _check(self, chosen: Checkpoint, latest: Checkpoint | None) -> None:
        """Raises UserError: the run cannot go on from the chosen checkpoint."""
        chosen.check_resumable()
        path, metadata = chosen.path, chosen.metadata
        saved, current = metadata["identity"], json.loads(json.dumps(identity(self._config)))
        if is_import(metadata):  # weights without a run: only the model must be the same
            current = {key: value for key, value in current.items() if key in saved or key.startswith("model.")}
        if changed := differences(saved, current):
            raise ConfigError(f"{path} cannot be resumed with another configuration: {'; '.join(changed)}: set "
                              "these keys as saved, or start afresh in another train.run_dir")
        if latest is not None and latest.path != path:
            latest.check_resumable()
            if latest.metadata["step"] > metadata["step"]:
                # Its next checkpoints would be older than those, which the run would resume from and keep instead.
                raise ConfigError(f"train.resume={path} is older than {latest.path}: delete the newer ones, resume "
                                  "that one with train.resume=auto, or choose another train.run_dir")

    def _refuse_lost(self) -> None:
        """Raises ConfigError: checkpoints were saved here, and none is left to go on from."""
        if not self._first:
            return
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            lost = f"{self.checkpoints} is no directory, or a link to none"
        elif (self.path / SAVED).exists():
            lost = f"its checkpoint {self._saved()} is gone or damaged, and so are all others in {self.checkpoints}"
        elif (self.path / SUMMARY).exists() or any(".tmp-" not in p.name for p in self.checkpoints.glob("step-*")):
            lost = f"{self.checkpoints} has no sound checkpoint"
        else:
            return
        raise ConfigError(f"train.run_dir={self.path} holds a run that cannot go on: {lost}: bring the checkpoints "
                          "back, choose another train.run_dir, or start this one afresh with train.resume=none")

    def _saved(self) -> str:
        try:
            with open_regular(self.path / SAVED) as file:
                return file.read(40).decode(errors="replace").strip()
        except OSError:
            return "of some step"

    def note_saved(self, checkpoint: Path) -> None:
        """Remember that there was a checkpoint: a run must not start afresh because its checkpoints are gone.

        Raises:
            OSError: it could not be written.
        """
        write_whole(self.path / SAVED, lambda path: path.write_text(f"{checkpoint.name}\n", encoding="utf-8"))

    def check_there(self) -> None:
        """Raises OSError: the directory was deleted, moved or given to another run meanwhile; on the first rank."""
        if self._lock is not None and not self._lock.is_ours():
            raise FileNotFoundError(f"train.run_dir={self.path} was deleted or moved under the run, or is another "
                                    "run's now: nothing more can be saved there")

    def begin(self, *, afresh: bool) -> None:
        """Write config.yaml, and forget that an earlier start was to be requeued, or with `afresh` ended; on the first
        rank.

        Raises:
            OSError: they could not be written.
        """
        if self._first:
            for name in (SAVED, SUMMARY) if afresh else ():
                (self.path / name).unlink(missing_ok=True)
            text = dump_config(self._config)
            write_whole(self.path / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
            take_requeue(self.path)

    def newest(self, groups: Groups) -> Checkpoint | None:
        """The newest sound checkpoint; collective."""
        return find_latest(self.checkpoints, groups, passed_over=self.passed_over)

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
        write_whole(self.path / SUMMARY, lambda path: path.write_text(text, encoding="utf-8"))


def is_import(metadata: dict[str, Any]) -> bool:
    """Whether a checkpoint holds weights that no run of this program trained: it has no place in any data."""
    return metadata["data"] is None
