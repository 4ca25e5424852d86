"""Where a run lives: who may write there, and the checkpoint that it goes on from."""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from hyena_dist.checkpoint.directory import Checkpoint, find_latest, open_checkpoint
from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import changes, differences, identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.plain import open_regular
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.train import WEIGHTS, TrainSection
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree, broadcast
from hyena_dist.runtime.files import write_durably, write_whole, writing
from hyena_dist.runtime.requeue import check_starts, note_first_step, take_requeue
from hyena_dist.runtime.run_lock import RunLock
from hyena_dist.train.history import Start, note_start, read_beginning

SAVED = "last_checkpoint"
"""Name of the file that names the newest checkpoint that was ever written here."""
SUMMARY = "summary.json"
_TOKEN = ".shared-"
"""Begins the name of a file by which ranks see whether they have the same directory."""
_SEEN_SECONDS = 10.0
"""For that file to be seen by every machine: network file systems remember for seconds that there was none."""

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
            TrainingError: SLURM has started the run in vain too often.
        """
        if not self._first:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"train.run_dir={self.path}: no such directory can be made ({error.strerror}): choose "
                              "another") from error
        self._lock = RunLock(self.path)
        try:
            check_starts(self.path)
        except BaseException:
            self.release()
            raise

    def note_first_step(self) -> None:
        """Remember that this start had a step; on the first rank.

        Raises:
            OSError: it could not be written.
        """
        if self._first:
            note_first_step(self.path)

    def check_shared(self, groups: Groups) -> None:
        """Refuse a directory that other machines do not have, as each rank writes its part of a checkpoint and its log
        there. Collective; before any other rank than the first makes anything in it.

        Raises:
            ConfigError: on every rank; names the first one that does not see the directory, and its host.
        """
        if groups.world.size == 1:
            return
        host, token = broadcast((socket.gethostname(), _TOKEN + secrets.token_hex(8)), groups)
        path = self.path / token
        agree(lambda: self._leave(path), groups)
        try:
            agree(lambda: self._look_for(path, groups.world.rank, host), groups)
        finally:
            if self._first:
                path.unlink(missing_ok=True)

    def _leave(self, token: Path) -> None:
        if self._first:
            for left in self.path.glob(f"{_TOKEN}*"):  # by a start that was killed
                left.unlink(missing_ok=True)
            with writing(token):
                write_durably(token, "")

    def _look_for(self, token: Path, rank: int, host: str) -> None:
        deadline = time.monotonic() + _SEEN_SECONDS
        while not token.exists():
            if time.monotonic() > deadline:
                raise ConfigError(f"rank {rank} (host {socket.gethostname()}) does not see train.run_dir="
                                  f"{self.path.absolute()} of rank 0 (host {host}), and every rank writes its part of "
                                  "a checkpoint there: choose a directory of a file system that all machines share")
            time.sleep(0.2)

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()

    def start_from(self, latest: Checkpoint | None, groups: Groups, *, objective: str = PRETRAINING,
                   frozen: Collection[str] = ()) -> Start | None:
        """What to begin with or to go on from, by `train.resume`; None for a fresh start. Collective.

        Where the directory holds a run already, that run goes on, also where `train.resume` names the checkpoint of
        another one from which it once was branched: the same command, started again, resumes the branch.

        Args:
            latest: the newest sound checkpoint in here.
            objective: the name of what this run learns.
            frozen: its weights that are not trained.

        Raises:
            UserError: on every rank. It was saved with another configuration, objective or set of frozen weights, is
                not sound, or would lose newer ones; the run had checkpoints and has none any more, or it began
                somewhere else than `train.resume` says.
        """
        train = self._config.train
        if latest is None and train.resume != "none":
            agree(self._refuse_lost, groups)
        if train.origin is None or (latest is not None and not self._holds(Path(train.origin))):
            if latest is None:
                return None
            if train.resume == "none":
                raise ConfigError(f"train.run_dir={self.path} holds a run already ({latest.path.name}): choose another "
                                  "directory, or resume it with train.resume=auto")
            agree(self._check_beginning, groups)
            start = Start(latest)
        else:
            start = Start(open_checkpoint(train.origin, groups), own=latest is not None,
                          takes="weights" if train.weights_only else "state")
        if start.checkpoint.has_no_run:
            start = replace(start, takes="weights")
        if start.takes == "state":
            agree(lambda: _check_learnt(start.checkpoint, objective, frozen), groups)
        return agree(lambda: self._checked(start, latest), groups)

    def _holds(self, path: Path) -> bool:
        """Whether a path in train.resume is this run, or one of its checkpoints."""
        own = self.checkpoints.resolve()
        return path.resolve() in (self.path.resolve(), own) or path.resolve().parent == own

    def _checked(self, start: Start, latest: Checkpoint | None) -> Start:
        """The start with the keys that it changes.

        Raises:
            UserError: the run cannot start so.
        """
        path, metadata = start.checkpoint.path, start.checkpoint.metadata
        whole = start.takes == "state"
        if whole:
            start.checkpoint.check_resumable()
        elif start.own and self._config.train.weights_only:
            raise ConfigError(f"train.resume={self._config.train.resume} is of the run in train.run_dir={self.path} "
                              "itself, and weights start a run of their own: choose another train.run_dir")
        saved, current = metadata.get("identity", {}), identity(self._config)
        if not whole:  # only the model must be the same
            current = {key: value for key, value in current.items() if key.startswith("model.")}
            saved = {key: value for key, value in saved.items() if key.startswith("model.")}
        if refused := differences(saved, current):
            otherwise = ("" if not whole or any(key.startswith("model.") for key in refused) else
                         f", or take the weights alone with train.resume=weights:{path} in another train.run_dir")
            raise ConfigError(f"{path} cannot be resumed with another configuration: {'; '.join(refused)}: set these "
                              f"keys as saved{otherwise}")
        if start.step > self._config.train.steps:
            raise ConfigError(f"train.steps={self._config.train.steps} is less than the {start.step} steps that {path} "
                              "has had: set it to more, or take an earlier checkpoint in another train.run_dir")
        if start.own and latest is not None and latest.path.name != path.name:
            latest.check_resumable()
            if latest.metadata["step"] > metadata["step"]:
                # Its next checkpoints would be older than those, which the run would resume from and keep instead.
                raise ConfigError(f"train.resume={path} is older than {latest.path}: resume that one with "
                                  "train.resume=auto, or branch from the older one in another train.run_dir")
        return replace(start, changed=tuple((key, *values) for key, values in changes(saved, current).items()))

    def _check_beginning(self) -> None:
        """Raises ConfigError: the run in here did not begin at what train.resume names; it is another one."""
        train, began = self._config.train, read_beginning(self.path)
        if not self._first or train.origin is None:
            return
        if began is None:  # of a version that did not write it down
            logger.info("train.run_dir=%s has a checkpoint of its own: going on from it, not from train.resume=%s",
                        self.path, train.resume)
        elif (str(began["resume"]).removeprefix(WEIGHTS) != _plain(train).removeprefix(WEIGHTS)
              or (train.weights_only and began["takes"] != "weights")):
            how = "afresh" if began["from"] is None else f"with the {began['takes']} of {began['from']}"
            raise ConfigError(f"train.run_dir={self.path} holds a run that began {how}, not at train.resume="
                              f"{train.resume}: choose another train.run_dir, or go on with this run by "
                              "train.resume=auto")

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

    def begin(self, start: Start | None) -> None:
        """Write config.yaml and a line of history, and forget that an earlier start was to be requeued, or had ended
        where this one has steps to go; on the first rank.

        Args:
            start: as `start_from` gave it.

        Raises:
            OSError: they could not be written.
        """
        if not self._first:
            return
        if start is None or not start.own:
            (self.path / SAVED).unlink(missing_ok=True)
            (self.path / SUMMARY).unlink(missing_ok=True)
        elif start.step < self._config.train.steps:
            self.note_saved(start.checkpoint.path)  # what the summary alone says of a run of older versions
            (self.path / SUMMARY).unlink(missing_ok=True)
        text = dump_config(self._config)
        write_whole(self.path / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
        note_start(self.path, start, _plain(self._config.train))
        take_requeue(self.path)
        if start is not None and start.changed:
            changed = (f"{key}: was {json.dumps(old)}, is {json.dumps(new)}" for key, old, new in start.changed)
            logger.info("changed since %s: %s", start.checkpoint.path, "; ".join(changed))

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
        began = read_beginning(self.path) or {}
        origin = {key: began[key] for key in ("from", "step", "takes")} if began.get("from") else None
        text = json.dumps({**numbers, "world_size": groups.world.size, "layout": layout, "branch": origin},
                          indent=1) + "\n"
        write_whole(self.path / SUMMARY, lambda path: path.write_text(text, encoding="utf-8"))


def _check_learnt(checkpoint: Checkpoint, objective: str, frozen: Collection[str]) -> None:
    """Raises ConfigError: the run of the checkpoint learnt something else, or trained other weights."""
    path = checkpoint.path
    otherwise = f"or take the weights alone with train.resume=weights:{path} in another train.run_dir"
    if checkpoint.objective != objective:
        raise ConfigError(f"{path} is of a run whose objective was {checkpoint.objective!r}, and that of this one is "
                          f"{objective!r}: resume it with the program that saved it, {otherwise}")
    saved = set(checkpoint.metadata.get("frozen", ()))
    if other := saved ^ set(frozen):
        was, now = ("frozen", "trained") if min(other) in saved else ("trained", "frozen")
        more = f", and {len(other) - 1} more are not as they were" if len(other) > 1 else ""
        raise ConfigError(f"{path} cannot be resumed with other frozen weights: {min(other)} was {was} and is {now} now"
                          f"{more}: freeze the same ones, {otherwise}")


def _plain(train: TrainSection) -> str:
    """train.resume, the path in it without `..` and links."""
    if train.origin is None:
        return train.resume
    return WEIGHTS * train.weights_only + str(Path(train.origin).resolve())
