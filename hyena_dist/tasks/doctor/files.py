"""Whether a directory is one and the same for all ranks, and does what a run needs of it."""

import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, TextIO

from hyena_dist.config.errors import write_remedy


class Probe:
    """A small directory inside the run directory, or where that is to be made. The first rank makes and removes it."""

    def __init__(self, run_dir: Path) -> None:
        parent = run_dir.absolute()
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        self.path = parent / f".doctor-{uuid.uuid4().hex[:12]}"
        self._held: TextIO | None = None

    def make(self) -> str:
        """Write, sync, rename and lock in it. Returns its path. Raises OSError: it cannot be done."""
        self.path.mkdir()
        (self.path / "token").write_text(self.path.name, encoding="utf-8")
        self._held = (self.path / "lock").open("w", encoding="utf-8")
        fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write(self.path, "first")
        return str(self.path)

    def remove(self) -> None:
        if self._held is not None:
            self._held.close()
        shutil.rmtree(self.path, ignore_errors=True)


def look(path: Path, name: str) -> list[dict[str, str]]:
    """What another rank finds wrong with the directory that the first one has made; each with its remedy."""
    shared = "the same directory must be there on every node: use one of a shared file system"
    try:
        if (path / "token").read_text(encoding="utf-8") != path.name:
            return [{"what": f"{path.parent} is another directory than that of rank 0", "remedy": shared}]
    except OSError:
        return [{"what": f"{path.parent}: what rank 0 has just written is not there", "remedy": shared}]
    try:
        _write(path, name)
    except OSError as error:
        return [problem(path, error)]
    with (path / "lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return []
        except OSError as error:
            return [{"what": f"{path.parent}: has no locks ({error.strerror})", "remedy": "mount it with locks"}]
    return [{"what": f"{path.parent}: a lock of rank 0 does not hold here",
             "remedy": "mount it with locks (without nolock or local_lock), or nothing keeps a second run out"}]


def problem(path: Path, error: OSError | dict[str, Any]) -> dict[str, str]:
    """A failure to write as something to report."""
    said = OSError(error["error"]) if isinstance(error, dict) else error
    why = re.sub(r"\[Errno \d+\] |: '.*'$", "", str(said))
    return {"what": f"{path.parent}: cannot be written, synced and renamed in ({why})",
            "remedy": write_remedy(said, "remount it for writing, or choose another train.run_dir")}


def _write(path: Path, name: str) -> None:
    aside = path / f"{name}.tmp"
    with aside.open("w", encoding="utf-8") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path / name)
