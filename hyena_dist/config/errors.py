"""Errors that commands print as one line. All others are defects."""

import errno
import re
from typing import TypeVar

Raised = TypeVar("Raised", bound=BaseException)


class UserError(ValueError):
    """Something that the user gave cannot be used; the message names the file, key or position, and the remedy."""

    status = 2
    """That a command ends with."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class TrainingError(RuntimeError):
    """A run that cannot go on, on every rank; the message names the step and the last good checkpoint. Its command ends
    with status 1."""


def agreed(error: Raised) -> Raised:
    """Mark an error that every rank raises: one of them is enough to print it."""
    error.__dict__["raised_by"] = "every rank"
    return error


def of_machine(error: Raised) -> Raised:
    """Mark an error that every rank of this machine raises, as of a file that each reads for itself: one of them is
    enough to print it. Another machine may have another file, or none."""
    error.__dict__["raised_by"] = "every rank of this machine"
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises this error; otherwise the first one may not be able to print it."""
    return isinstance(error, TrainingError) or error.__dict__.get("raised_by") == "every rank"


def is_of_machine(error: BaseException) -> bool:
    """Whether every rank of this machine raises this error, and perhaps those of no other."""
    return error.__dict__.get("raised_by") == "every rank of this machine"


def one_line(error: object) -> str:
    """A message, or what another object says, in one line; of an error without one its type."""
    return " ".join(str(error).split()) or type(error).__name__


_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
                  "CUFFT_ALLOC_FAILED")
"""In errors of torch's that have no type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left; torch is not imported to ask."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)))


_REMEDIES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (`ulimit -n`)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO),
                    "have its disk or file server looked at"),
}
_READ_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "get permission to read it"),
    **_REMEDIES,
}
"""What mends a failed read, by its number."""
_WRITE_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "get permission to write there"),
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    **_REMEDIES,
}
"""What mends a failed write, by its number; for all others, as a read-only file system, only another place does."""


def write_remedy(error: BaseException, elsewhere: str) -> str:
    """What to do about a failed write: what its kind asks for, or else `elsewhere`, a phrase that says how to choose
    another place. The number of an error that a library has wrapped is found in its text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\[Errno (\d+)\]", str(error))):
        number = int(found[1])
    mend = _WRITE_REMEDIES.get(number or 0)
    return f"{mend} or {elsewhere}" if mend else elsewhere


def read_remedy(error: BaseException, otherwise: str) -> str:
    """What to do about a file that could not be opened or read: what the error's kind asks for, else `otherwise`."""
    return _READ_REMEDIES.get(getattr(error, "errno", None) or 0, otherwise)


def first_sentence(error: BaseException) -> str:
    """Of a library's message, in one line: those of torch go on with advice, to trust the file for one."""
    return re.split(r"\. ", one_line(error), maxsplit=1)[0].removesuffix(".")
