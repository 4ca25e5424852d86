"""Perplexity of a trained run on held-out bases, on a GPU if there is one, beside Markov chains fitted on the same
training bases. What is found on the run's own validation bases is left in RUN/evaluation.json, and RUN/report.png is
drawn again with the Markov chains in it.

example: python launchers/evaluate.py runs/quickstart
         python launchers/evaluate.py runs/quickstart --checkpoint best
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hyena_dist.config.errors import UserError, one_line
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
    parser.add_argument("--shards", help="another shard directory than the run's own")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="held-out bases to score (val)")
    parser.add_argument("--must-beat-order", type=int, choices=ORDERS, metavar="K",
                        help="exit with status 1 unless the model beats the Markov chain of this order")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when --must-beat-order is not met, 2 a mistake of the user's, 130 interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        return _run(args)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.tasks.evaluate import evaluate
    raise_interrupts()
    result = evaluate(args.run_dir, checkpoint=args.checkpoint, shards=args.shards, split=args.split)
    print(f"{result.checkpoint}, split {args.split}")
    table = Table()
    table.add_column("model")
    table.add_column("perplexity per base", justify="right")
    for order, perplexity in enumerate(result.markov):
        table.add_row(f"Markov chain, order {order}", f"{perplexity:.4f}")
    table.add_row("HyenaDNA", f"{result.model:.4f}", style="bold")
    Console().print(table)
    if args.shards is None and args.split == "val":
        try:
            print(f"written: {', '.join(map(str, _keep(Path(args.run_dir), result)))}")
        except OSError as error:  # another's run, or a full disk: the answer stands above
            print(f"note: not kept: {one_line(error)}", file=sys.stderr)
    if args.must_beat_order is not None and not result.model < result.markov[args.must_beat_order]:
        print(f"the model does not beat the Markov chain of order {args.must_beat_order}", file=sys.stderr)
        return 1
    return 0


def _keep(run_dir: Path, evaluation: "Evaluation") -> list[Path]:
    """Leave an evaluation on the run's own validation bases in its directory, and draw its report again, with the
    Markov chains; returns the files that were written.

    Raises:
        OSError: they cannot be written.
    """
    from hyena_dist.runtime.files import write_whole
    from hyena_dist.train.report import EVALUATION, write_report

    path = run_dir / EVALUATION
    model = evaluation.model if math.isfinite(evaluation.model) else None  # JSON has no other numbers
    content = {**asdict(evaluation), "checkpoint": evaluation.checkpoint.name, "model": model}
    write_whole(path, lambda aside: aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
    report = write_report(run_dir)
    return [path, *([report] if report else [])]
