"""Write a needle table: random sequences in which a motif far back decides the label, among near copies of it. A model
that is fine-tuned on it with finetune.pooling=last shows that its context reaches that far.

examples: hyena-dist needle needle-8k --length 8192
          hyena-dist needle needle-1k --length 1024 --copies 4 --train 2400
          hyena-dist needle --report runs/needle/seed-0/predictions.tsv
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from hyena_dist.config.errors import UserError, one_line
from hyena_dist.config.plain import open_regular
from hyena_dist.tasks.needle_size import NeedleSize


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="The recipe is in docs/long-context.md, its settings in "
                                            "configs/finetune/needle.yaml.")
    parser.add_argument("dest", nargs="?", type=Path, help="directory to write train.csv, dev.csv and test.csv into")
    parser.add_argument("--report", type=Path, metavar="TSV", help="print the accuracy by slice of a fine-tuned run's "
                                                                    "predictions.tsv")
    helps = {"length": "bases of a sequence", "slices": "equal parts; the last never holds the motif",
             "motif": "bases of a motif", "mismatches": "bases in which a distractor differs from its motif",
             "distractors": "near copies of either motif in each sequence",
             "copies": "motifs in a training sequence, at most: more are easier to find", "seed": "of everything"}
    for field in fields(NeedleSize):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N",
                            help=f"{helps[field.name]}; default {field.default}")
    for name, count in (("train", 2000), ("valid", 198), ("test", 3000)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"sequences; default {count}")
    args = parser.parse_args(argv)
    if (args.dest is None) == (args.report is None):
        parser.error("give a directory to write, or --report with a predictions.tsv")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where an argument cannot be used."""
    args = parse_args(argv)
    from hyena_dist.tasks.needle import Needle, accuracy_by_slice, write_needle  # numpy takes long, --help should not

    try:
        if args.report is not None:
            return _report(args.report, accuracy_by_slice)
        needle = Needle(**{field.name: getattr(args, field.name) for field in fields(NeedleSize)})
        write_needle(args.dest, needle, train=args.train, valid=args.valid, test=args.test)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _report(path: Path, by_slice: Callable[[Sequence[str]], dict[int, tuple[int, int]]]) -> int:
    try:
        with open_regular(path) as file:
            found = by_slice(file.read().decode("utf-8").splitlines())
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--report {path}: {one_line(error)}") from None
    for part, (right, count) in sorted(found.items()):
        print(f"slice {part}: {right} of {count} right, {right / count:.1%}")
    return 0
