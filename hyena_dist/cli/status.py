"""How commands end."""

import os
import sys
from collections.abc import Callable

from hyena_dist.config.errors import UserError, is_agreed, is_of_machine, one_line


def exit_status(run: Callable[[], int | None]) -> int:
    """The exit status of a command: what it returns, or 0; 130 where it is interrupted; for a mistake of the user's,
    which is printed in one line, that of its kind (`UserError.status`)."""
    try:
        return run() or 0
    except (UserError, OSError) as error:
        print_error(error)
        return error.status if isinstance(error, UserError) else UserError.status
    except KeyboardInterrupt:
        return 130


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
