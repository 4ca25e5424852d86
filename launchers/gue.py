"""Pretrain small models, fine-tune them on the tasks of GUE beside models that know nothing, and write the page of
docs/results. Started again, it goes on where it was stopped.

example: python launchers/gue.py --genomes human=chr2.fa.gz yeast=r64.fa.gz --gue GUE --out runs/gue-results
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it

from benchmarks.commands import add_page_options, make_page


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="section.key=value", help="of every fine-tuning")
    parser.add_argument("--genomes", nargs="+", required=True, metavar="SPECIES=FILE", help="to pretrain on")
    parser.add_argument("--gue", required=True, metavar="DIR", help="the data sets of GUE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of all runs")
    parser.add_argument("--steps", type=int, default=3600,
                        help="of each pretraining (3600: a quarter of an hour on two cores)")
    parser.add_argument("--most", type=int, default=2000, metavar="N", help="training sequences of a task (2000)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of the pretraining (2)")
    add_page_options(parser)
    args = parser.parse_intermixed_args(argv)
    if args.steps < 4 or args.ranks < 1:
        parser.error(f"--steps {args.steps} and --ranks {args.ranks}: must be at least 4 and 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where a command has failed or nothing is finished."""
    args = parse_args(argv)
    from benchmarks.gue import Plan, commands, page  # numpy takes a second, --help should not

    tasks = [word for word in args.tasks if "=" not in word]
    keys = [*args.keys, *(word for word in args.tasks if "=" in word)]
    plan = Plan(tuple(args.genomes), args.gue, args.out, args.steps, args.most, tuple(tasks), args.ranks, tuple(keys))
    return make_page(args, commands(plan), lambda docs: page(plan, docs))


if __name__ == "__main__":
    sys.exit(main())
