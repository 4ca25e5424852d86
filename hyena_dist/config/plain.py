"""Files that are read back, which somebody else may have written: regular files, and plain data in them."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: as `regular_descriptor`.
    """
    return os.fdopen(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path) -> int:
    """A descriptor of a file that is opened for reading. A pipe, which would be waited for, or a device, which may
    never end, is no file.

    Raises:
        OSError: it cannot be opened, or is something else than a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
        raise OSError(errno.EINVAL, f"it is no regular file but {kind}", str(path))
    return descriptor


_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


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


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for, in lists and mappings too: `read_object` would refuse it."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
