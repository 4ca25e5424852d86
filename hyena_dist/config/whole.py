"""Directories that are whole or not there."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY})
"""What file systems answer that do not sync directories."""


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where its file system knows how to (CIFS and some of FUSE do
    not, and refuse)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that is whole or not there: gives one aside to write into, and renames it to `path` at the end.

    Raises:
        OSError: it could not be written, or `path` exists; nothing is left of it.
    """
    aside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        sync_directory(aside)
        if path.exists():  # a rename would replace an empty directory
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        aside.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
