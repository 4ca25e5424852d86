"""Commands that a page of docs/results is made of, run one after the other."""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hyena_dist.config.errors import ConfigError, UserError, one_line
from hyena_dist.runtime.signals import EXIT_REQUEUE

ROOT = Path(__file__).parents[1]

logger = logging.getLogger(__name__)


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """--docs, --dry-run and --page, which `make_page` reads."""
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), metavar="DIR",
                        help="where the page is written (docs/results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--page", action="store_true", help="write the page of what is finished, run nothing")


def make_page(args: argparse.Namespace, commands: Sequence[Sequence[str]], page: Callable[[Path], Path]) -> int:
    """Run the commands and write the page that `page` makes in a directory, as the options say. Exit status: 0, or 2
    where a command has failed or what the page is of is not there."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return 0
    try:
        if not args.page:
            run_all(commands)
        print(f"written: {page(args.docs)}")
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run_all(commands: Iterable[Sequence[str]]) -> None:
    """Run every command; each goes on, or ends at once, where an earlier call has been through it.

    Raises:
        ConfigError: one has failed, or was stopped; the same call goes on.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for command in commands:
        logger.info("running %s", shlex.join(command))
        status = subprocess.run(command, env=environment, check=False).returncode
        if status == EXIT_REQUEUE:
            raise ConfigError("stopped: the same command goes on")
        if status:
            raise ConfigError(f"{shlex.join(command)}: ended with status {status}: mend what it says, and give the "
                              "same command")
