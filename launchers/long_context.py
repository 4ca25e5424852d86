"""Teach a small model to find a motif 8,192 bases back over four context ranks, judge it with the exchange between the
ranks and without, and write the page of docs/results. Started again, it goes on where it was stopped.

example: python launchers/long_context.py --out runs/needle
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it

from benchmarks.commands import add_page_options, make_page


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of all tables and runs")
    add_page_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where a command has failed or what the page is of is not there."""
    args = parse_args(argv)
    from benchmarks.needle import commands, page  # numpy takes a second, --help should not

    return make_page(args, commands(args.out), lambda docs: page(args.out, docs))


if __name__ == "__main__":
    sys.exit(main())
