"""Perplexity of a trained run on held-out bases, on a GPU if there is one, beside Markov chains fitted on the same
training bases: of all of them, and by source, species, share of G and C, upper and lower case, and the classes of a
BED. What is found on the run's own validation bases is left in RUN/evaluation.json, and RUN/report.png is drawn again
with the Markov chains in it.

example: python launchers/evaluate.py runs/quickstart
         python launchers/evaluate.py runs/quickstart --checkpoint best
         python launchers/evaluate.py runs/quickstart --shards shards/other --regions genes.bed --out other.tsv
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.config.plain import finite
from hyena_dist.runtime.files import check_new, write_whole
from hyena_dist.runtime.signals import raise_interrupts

if TYPE_CHECKING:
    from hyena_dist.tasks.evaluate import Evaluation

ORDERS = range(7)
"""Of the Markov chains."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="a run directory with a whole checkpoint")
    parser.add_argument("--checkpoint", default="latest", metavar="latest|best|PATH",
                        help="the newest (latest), that of the lowest validation loss, or a checkpoint's directory")
    parser.add_argument("--shards", metavar="DIR", help="another shard directory than the run's own; of a run of a "
                        "mixture, that or the directory in which its sets lie")
    parser.add_argument("--split", default="val", choices=("val", "test", "train"), help="the bases to score (val)")
    parser.add_argument("--regions", metavar="FILE", help="a BED of contig, start, end, class, or an "
                        "annotation (.gff, .gff3, .gtf): the perplexity of each class is shown, and of the rest")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found to this new .json or .tsv, too")
    parser.add_argument("--must-beat-order", type=int, choices=ORDERS, metavar="K",
                        help="exit with status 1 unless the model beats the Markov chain of this order")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when --must-beat-order is not met, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.tasks.evaluate import evaluate
    raise_interrupts()
    if args.out is not None and args.out.suffix not in FORMATS:
        raise ConfigError(f"--out {args.out}: name a file that ends in {' or '.join(FORMATS)}")
    if args.out is not None:
        check_new("--out", args.out)
    result = evaluate(args.run_dir, checkpoint=args.checkpoint, shards=args.shards, split=args.split,
                      regions=args.regions)
    _print(result)
    if args.out is not None:
        _write(args.out, FORMATS[args.out.suffix](result))
        print(f"written: {args.out}")
    if args.shards is None and args.split == "val":
        try:
            print(f"written: {', '.join(map(str, _keep(Path(args.run_dir), result)))}")
        except OSError as error:  # another's run, or a full disk: the answer stands above
            print(f"note: not kept: {one_line(error)}", file=sys.stderr)
    if args.must_beat_order is not None and not result.model < result.markov[args.must_beat_order]:
        print(f"the model does not beat the Markov chain of order {args.must_beat_order}", file=sys.stderr)
        return 1
    return 0


def _print(result: "Evaluation") -> None:
    print(f"{result.checkpoint}, split {result.split} of {_names(result.shards)}: {result.bases:,} bases scored, "
          f"windows of {result.seq_len:,} tokens; Markov chains fitted on {_names(result.markov_of)}")
    table = Table()
    table.add_column("model")
    table.add_column("perplexity per base", justify="right")
    for order, perplexity in enumerate(result.markov):
        table.add_row(f"Markov chain, order {order}", f"{perplexity:.4f}")
    table.add_row("HyenaDNA", f"{result.model:.4f}", style="bold")
    console = Console()
    console.print(table)
    told_apart = {what: groups for what, groups in result.groups.items() if len(groups) > 1 or what == "region"}
    if not told_apart:
        return
    console.width = max(console.width, 100)  # a file has no width
    table = Table("by", "group", *(Column(name, justify="right", no_wrap=True) for name in
                                   ("bases", "HyenaDNA", "best Markov chain")))
    for what, groups in told_apart.items():
        for number, (name, group) in enumerate(groups.items()):
            best = min(range(len(group.markov)), key=group.markov.__getitem__)
            table.add_row("" if number else what, name, f"{group.bases:,}", f"{group.model:.4f}",
                          f"{group.markov[best]:.4f} (order {best})", end_section=number == len(groups) - 1)
    console.print(table)


def _names(directories: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(directories))


def _json(result: "Evaluation") -> str:
    content = {**asdict(result), "checkpoint": result.checkpoint.name}
    return json.dumps(finite(content), indent=1) + "\n"


def _tsv(result: "Evaluation") -> str:
    rows: list[list[Any]] = [["by", "group", "bases", "model",
                              *(f"markov_{order}" for order in range(len(result.markov)))],
                             ["all", "all", result.bases, result.model, *result.markov]]
    rows += [[what, name, group.bases, group.model, *group.markov]
             for what, groups in result.groups.items() for name, group in groups.items()]
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


FORMATS = {".json": _json, ".tsv": _tsv}
"""Of --out, by its ending."""


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _keep(run_dir: Path, evaluation: "Evaluation") -> list[Path]:
    """Leave an evaluation on the run's own validation bases in its directory, and draw its report again, with the
    Markov chains; returns the files that were written.

    Raises:
        OSError: they cannot be written.
    """
    from hyena_dist.train.report import EVALUATION, write_report

    path = run_dir / EVALUATION
    _write(path, _json(evaluation))
    report = write_report(run_dir)
    return [path, *([report] if report else [])]
