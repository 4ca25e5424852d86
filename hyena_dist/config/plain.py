"""Files that are read back, which somebody else may have written: regular files, and plain data in them."""

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hyena_dist.config.errors import ConfigError


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. A pipe, which would be waited for, or a device, which may never end, is no file.

    Raises:
        OSError: it cannot be opened, or is something else than a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or a number that JSON does not have.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value


def refuse_interpolation(value: Any, source: str, key: str = "") -> None:
    """Refuse text that OmegaConf would replace, by the environment of whoever reads it for one.

    Raises:
        ConfigError: naming the key.
    """
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{source}: {key or 'it'} holds an interpolation ({value!r:.60}), which is not resolved in a "
                          "file that is read back: write the value itself")
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_interpolation(str(name), source, key)
            refuse_interpolation(item, source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            refuse_interpolation(item, source, key)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
