"""Teach a small model to find a motif 8,192 bases back over four context ranks, judge it with the exchange between the
ranks and without, and write the page of docs/results. Started again, it goes on where it was stopped.

example: python launchers/long_context.py --out runs/needle
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it

from hyena_dist.config.errors import UserError, one_line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of all tables and runs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), metavar="DIR",
                        help="where the page is written (docs/results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--page", action="store_true", help="write the page of what is finished, run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where a command has failed or what the page is of is not there."""
    args = parse_args(argv)
    import logging
    import shlex

    from benchmarks.commands import run_all
    from benchmarks.needle import commands, page  # numpy takes a second, --help should not

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        if args.dry_run:
            print("\n".join(shlex.join(command) for command in commands(args.out)))
            return 0
        if not args.page:
            run_all(commands(args.out))
        page(args.out, args.docs)
        print(f"written: {args.docs / 'needle.md'}")
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
