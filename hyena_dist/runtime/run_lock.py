"""One run per run directory: the second is refused, and a run that is killed leaves nothing locked."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.plain import open_regular
from hyena_dist.runtime.files import writing
from hyena_dist.runtime.launcher import job_id

logger = logging.getLogger(__name__)


class InUse(ConfigError):
    """Another process has the directory."""

    holder = ""
    """Who it is, in words."""


class RunLock:
    """Holds `run_dir/lock` until `release`, or until this process ends in whatever way: the kernel frees it.

    For the first rank only; the others hear of a refusal through `agree`. A POSIX record lock: reader processes forked
    later do not inherit it, so they cannot outlive the run with it, and NFS passes it to other machines. It keeps out
    other processes, not a second one of this process.

    Args:
        run_dir: exists.

    Raises:
        InUse: another process holds it.
        OSError: the file cannot be made.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._file = self._locked()
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job_id(),
                  "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._text = json.dumps(holder) + "\n"
        with writing(self.path):
            self._file.truncate(0)
            self._file.write(self._text)
            self._file.flush()

    def is_ours(self) -> bool:
        """Whether the file is still there and names this process.

        Read through the descriptor that holds the lock: a process that closes any other one of the file loses it. Only
        where the path leads to another file is that opened. Inodes change on some FUSE: then its text tells that it is
        the same, and the lock is taken again.
        """
        try:
            here = self._file.fileno()
            if os.path.samestat(os.fstat(here), self.path.stat()):
                return os.pread(here, len(self._text) + 1, 0) == self._text.encode()
            with open_regular(self.path) as file:
                text = file.read()
            return text == self._text.encode() and self._is_taken_again()
        except FileNotFoundError:
            return False
        except OSError:  # it may be there
            return True

    def _is_taken_again(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self) -> None:
        """Free the directory; the file goes too."""
        if not self._file.closed:
            if self.is_ours():
                self.path.unlink(missing_ok=True)  # while locked: who has opened it sees that it is no longer the file
            self._file.close()

    def _locked(self) -> TextIO:
        while True:
            with writing(self.path):
                file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # POSIX allows both
                holder = _holder(file)
                file.close()
                error = InUse(f"train.run_dir={self.path.parent} is in use by another run ({holder}): wait for it to "
                              "end, stop it, or choose another train.run_dir")
                error.holder = holder
                raise error from None
            except OSError as error:
                logger.warning("%s: this file system has no locks (%s): nothing keeps a second run out of the run "
                               "directory", self.path, error.strerror)
                return file
            try:
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass
            file.close()  # released between our opening and our locking it: that file is gone


def _holder(file: TextIO) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        job = f", SLURM job {holder['job']}" if holder["job"] else ""
        return f"host {holder['host']}, process {holder['pid']}{job}, since {holder['since']}"
    except (ValueError, KeyError, TypeError, OSError):  # it has just been locked
        return "which has just started"
