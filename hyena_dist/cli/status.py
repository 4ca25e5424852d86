"""How commands end."""

import os
import sys
from collections.abc import Callable

from hyena_dist.config.errors import UserError, is_agreed, is_of_machine, one_line
from hyena_dist.runtime.signals import Terminated


def exit_status(run: Callable[[], int | None]) -> int:
    """The exit status of a command: what it returns, or 0; where it is interrupted `interrupt_status`; for a mistake of
    the user's, which is printed in one line, that of its kind (`UserError.status`)."""
    try:
        return run() or 0
    except (UserError, OSError) as error:
        print_error(error)
        return error.status if isinstance(error, UserError) else UserError.status
    except KeyboardInterrupt as interrupt:
        return interrupt_status(interrupt)


def interrupt_status(interrupt: KeyboardInterrupt) -> int:
    """The exit status of a command that Ctrl-C ends, 130, or SIGTERM, 143. Whoever reads the output may not know of the
    second, so that a line says it."""
    if not isinstance(interrupt, Terminated):
        return 130
    if is_first():
        print("stopped by SIGTERM: give the same command again", file=sys.stderr)
    return 143


def print_error(error: BaseException) -> None:
    """Print an error in one line, on one of the ranks that raise it: the first, or the first of this machine."""
    if is_agreed(error):
        prints = is_first()
    elif is_of_machine(error):
        prints = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    else:
        prints = True
    if prints:
        print(f"error: {one_line(error)}", file=sys.stderr)


def is_first() -> bool:
    """Whether this is the first rank, whoever started it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
