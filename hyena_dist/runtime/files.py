"""Files that are whole or not there, and an error that says what to do where they cannot be written."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hyena_dist.config.errors import ConfigError, write_remedy

_ELSEWHERE = "change train.run_dir"

logger = logging.getLogger(__name__)


def check_directory(option: str, path: Path) -> None:
    """Raises ConfigError: there is no directory for the file that an option names; known before anything is
    computed."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}: make it, or choose another")


def check_new(option: str, path: Path) -> None:
    """Raises ConfigError: the file that an option names would be written over, or has no directory."""
    if path.exists():
        raise ConfigError(f"{option} {path}: exists: choose another, or remove it")
    check_directory(option, path)


def check_picture(path: Path | None, endings: Sequence[str] = (".png", ".pdf")) -> None:
    """Raises ConfigError: --picture names a file that cannot be drawn; known before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(f"--picture {path}: let its name end in {' or '.join(endings)}")
    check_directory("--picture", path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"--picture {path}: is drawn by matplotlib; install it with pip install "
                          "'hyena-dist[plots]'") from None


@contextmanager
def writing(path: Path, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """A context in which a failed write is one line with the file's name and the remedy.

    Args:
        elsewhere: how another place is chosen.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error}): "
                      f"{write_remedy(error, elsewhere)}") from error


def write_durably(path: Path, text: str) -> None:
    """Write a text file, and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[Path], object], elsewhere: str = _ELSEWHERE) -> None:
    """Let `write` write a file beside `path`, and rename it to `path` when it is on the disk.

    Args:
        elsewhere: as of `writing`.

    Raises:
        OSError: it could not be written; what was at `path` is as before.
    """
    aside = path.with_name(f"{path.stem}.tmp{path.suffix}")
    with writing(path, elsewhere):
        try:
            write(aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def surviving(path: Path, consequence: str) -> Iterator[None]:
    """A context in which a failed write is logged, with what follows from it, and ends nothing."""
    try:
        yield
    except OSError as error:
        logger.error("%s: could not be written (%s): %s; %s", path, error.strerror or error,
                     write_remedy(error, "start again in another train.run_dir"), consequence)
