"""What a fine-tuned model says of new sequences: a class, labels or a number of each, and the probabilities. They are
read as the run read its test split, and need no labels; of a run of several seeds the answers are averaged. On a GPU if
there is one; under torchrun the ranks share the sequences, or with --context each sequence, and write the same file.
What is killed goes on where it was: give the same command again.

examples: python launchers/predict.py --from runs/mouse-0 --sequences new.fa --out answers.tsv
          hyena-dist predict --from runs/peaks --sequences peaks.bed --fasta mm39.fa.gz --out answers.parquet
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hyena_dist.cli.reading import add_context_option, check_context, open_ranks, quiet
from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import UserError, of_machine, one_line
from hyena_dist.runtime.signals import raise_interrupts

MOST_NAMED = 20
"""Answers that are counted by name on the screen; combinations of labels may be thousands."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", required=True, dest="source", type=Path, metavar="RUN",
                        help="train.run_dir of a finished fine-tuning, or the directory of one of its seeds")
    parser.add_argument("--seed", type=int, metavar="N", help="ask this seed alone (default: the mean of all)")
    parser.add_argument("--sequences", type=Path, required=True, metavar="FILE", help="FASTA; a CSV, TSV or parquet "
                        "file with a column of sequences, whose other columns are carried over; or intervals, with "
                        "--fasta")
    parser.add_argument("--fasta", type=Path, metavar="F", help="what intervals are cut out of")
    add_context_option(parser, "sequence")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .tsv or .parquet; "
                        "where places of sequences have answers, an .npz, whose index is written to FILE.tsv")
    parser.add_argument("--dry-run", action="store_true", help="check run and sequences, and answer nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    quiet()
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.data.asked import read_asked
    from hyena_dist.data.tokenizer import tokenizer_of
    from hyena_dist.tasks.predict.answers import Request, check_request, predict
    from hyena_dist.tasks.predict.finished import read_finished

    raise_interrupts()
    check_context(args.context)
    try:
        runs = read_finished(args.source, args.seed)
        first = runs[0]
        asked = read_asked(args.sequences, first.config.finetune, tokenizer_of(first.config.model), most=first.most,
                           genome=args.fasta)
        request = Request(runs, asked, args.sequences, args.out)
        if args.dry_run:
            check_request(request)
    except UserError as error:
        raise of_machine(error) from None
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {first.config.train.seed}"
    what = f"{_counted(len(asked.examples))}, {first.task} by {seeds} of {args.source}"
    if args.dry_run:
        print(f"would answer {what}")
        _warn(asked.notes)
        return 0
    device, groups = open_ranks(args.context)
    said = predict(request, groups, device)
    if groups.world.rank == 0:
        print(f"{args.out}: {what}")
        most = said.most_common(MOST_NAMED)
        for name, count in most:
            print(f"  {_counted(count)}: {_answer(first.task, name)}")
        if rest := said.total() - sum(count for _, count in most):
            print(f"  {_counted(rest)}: other answers")
        _warn(asked.notes)
    return 0


def _counted(count: int) -> str:
    return f"{count:,} sequence{'s' * (count != 1)}"


def _answer(task: str, answer: str) -> str:
    """What a table of answers says of a sequence, as words: a class, or the labels that it has."""
    from hyena_dist.data.tables import NO_LABEL

    if task == "classification":
        return f"class {answer}"
    return "no label" if answer == NO_LABEL else f"label{'s' * (';' in answer)} {answer}"


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"warning: {one_line(note)}", file=sys.stderr)
