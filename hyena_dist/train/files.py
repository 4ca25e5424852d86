"""Files that are whole or not there, and an error that says what to do where they cannot be written."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY})
"""What file systems answer that do not sync directories."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which a failed write is one line with the file's name and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error}): make room there or change "
                      "train.run_dir") from error


def write_durably(path: Path, text: str) -> None:
    """Write a text file, and wait until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, and rename it to `path` when it is on the disk.

    Raises:
        OSError: it could not be written; what was at `path` is as before.
    """
    aside = path.with_name(f"{path.stem}.tmp{path.suffix}")
    with writing(path):
        try:
            write(aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
