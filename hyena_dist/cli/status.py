"""How commands end."""

import os
import sys
from collections.abc import Callable

from hyena_dist.config.errors import UserError, is_agreed, one_line


def exit_status(run: Callable[[], int | None]) -> int:
    """The exit status of a command: what it returns, or 0; 130 where it is interrupted; for a mistake of the user's,
    which is printed in one line, that of its kind (`UserError.status`). What all ranks raise the first one prints."""
    try:
        return run() or 0
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0 or not is_agreed(error):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else UserError.status
    except KeyboardInterrupt:
        return 130
