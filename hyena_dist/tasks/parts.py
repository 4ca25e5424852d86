"""The finished parts of a long task, beside the file that they become: what is killed goes on where it was."""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError, one_line, write_remedy
from hyena_dist.config.plain import read_object
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.files import check_directory, check_new, write_durably, write_whole
from hyena_dist.runtime.run_lock import InUse, RunLock
from hyena_dist.runtime.startup import refuse_differences

ANOTHER = "choose another --out"
"""What else to do where a file cannot be written."""
_SEEN_SECONDS = 60.0
"""For a part to be seen by another machine: network file systems remember for up to half a minute that there was none.
"""


class Parts:
    """A directory OUT.parts: arrays by the name of their part, each whole or not there, and the facts that decide what
    is in them. It goes when the file is written."""

    def __init__(self, out: Path) -> None:
        """Raises ConfigError: `out` is no name of a file."""
        if not out.name:
            raise ConfigError(f"--out {out}: is a directory: name a file in it")
        self._out, self.path = out, out.with_name(f"{out.name}.parts")
        self._lock: RunLock | None = None

    def check_outputs(self, files: Mapping[str, Path]) -> None:
        """Refuse to write over what is there, before anything is computed.

        Args:
            files: to be written, by the option that names each.

        Raises:
            ConfigError: one exists and is not of an earlier call that goes on now, or a directory is missing.
        """
        for option, path in files.items():
            (check_directory if self.path.is_dir() else check_new)(option, path)

    def begin(self, facts: Mapping[str, Any], groups: Groups) -> None:
        """Begin, or go on with what an earlier call has left there; on the first rank. Until its process ends, or the
        parts go, no other process may begin here. Collective.

        Each rank has read model and inputs by itself, and one of them may have found others: those of another machine,
        or the checkpoint that a run has saved meanwhile. So the ranks compare their facts; but for counts and
        measurements, which are mappings: they follow from the others, or depend on the device.

        Raises:
            ConfigError: on every rank. The facts are not the same on all, an earlier call would have written another
                file, it cannot be read what it would have, or it is still at work.
            OSError: on every rank. It cannot be made.
        """
        refuse_differences({key: json.dumps(value) for key, value in facts.items() if not isinstance(value, Mapping)},
                           groups.world, remedy="give every machine the same files, and name the checkpoint itself "
                           "where its run still saves")
        agree(lambda: self._begin(facts) if groups.world.rank == 0 else None, groups)

    def _begin(self, facts: Mapping[str, Any]) -> None:
        """What an earlier call has left is forgotten where that is no part."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"--out {self._out}: its directory {self._out.absolute().parent} cannot be written: "
                          f"{self.path.name} could not be made there ({error.strerror or error}): "
                          f"{write_remedy(error, ANOTHER)}") from error
        if self._lock is None:
            self._lock = self._taken()
        path = self.path / "facts.json"
        facts = json.loads(json.dumps(facts))
        if not path.exists() or not self.has_any:
            write_whole(path, lambda aside: write_durably(aside, json.dumps(facts, indent=1)), ANOTHER)
            return
        try:
            there = read_object(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({one_line(error)}): remove {self.path} to begin anew") from None
        if changed := sorted(key for key in facts.keys() | there.keys() if facts.get(key) != there.get(key)):
            raise ConfigError(f"{self.path}: was begun with another {', '.join(changed)}: go on as it was begun, or "
                              "remove it")

    @property
    def has_any(self) -> bool:
        """Whether an earlier call has left a part; what it was writing when it was killed is none."""
        return any(not path.stem.endswith(".tmp") for path in self.path.glob("*.npz"))

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Write a part."""
        def write(aside: Path) -> None:
            with aside.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        write_whole(self._file(name), write, ANOTHER)

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """A part; None: it is not there, or not whole."""
        try:
            with np.load(self._file(name), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def has(self, name: str, groups: Groups) -> bool:
        """Whether a part is finished, as the first of the ranks that share a sequence sees it: all must do the same."""
        there = [self.load(name) is not None]
        if groups.context.size > 1:
            dist.broadcast_object_list(there, group=groups.context.group, group_src=0)
        return there[0]

    def need(self, name: str) -> dict[str, np.ndarray]:
        """A part that some rank has written, of whichever machine.

        Raises:
            ConfigError: it is not there, and does not come.
        """
        deadline = time.monotonic() + _SEEN_SECONDS
        while (found := self.load(name)) is None:
            if time.monotonic() > deadline:
                raise ConfigError(f"{self._file(name)}: is not there: ranks on several machines need --out on a file "
                                  "system that all of them have")
            time.sleep(0.2)
            os.listdir(self.path)  # who opens a directory is told what has changed in it
        return found

    def once(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """A part that one rank makes and needs, which is made and written where it is not there yet."""
        found = self.load(name)
        if found is not None:
            return found
        made = make()
        self.save(name, **made)
        return made

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _taken(self) -> RunLock:
        try:
            return RunLock(self.path)
        except InUse as error:
            raise ConfigError(f"{self.path}: another call is writing these parts ({error.holder}): wait for its end, "
                              f"stop it, or {ANOTHER}") from None

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npz"


def names(parts: Sequence[int]) -> str:
    """A part's name of its numbers, which sorts as they do."""
    return "-".join(f"{number:08d}" for number in parts)
