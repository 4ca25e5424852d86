"""Scaling laws from runs that are finished: how the loss falls with size, tokens and length, which size is best for a
budget, and how the learning rate moves with the width (docs/scaling.md).

examples: python launchers/scaling.py fit runs/my-sweep --out runs/my-sweep/report
          python launchers/scaling.py fit theirs.csv --column loss=val --column flops=budget --out report
          python launchers/scaling.py rates runs/my-sweep --out report
          python launchers/scaling.py widths --shards shards/quickstart --out report
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.signals import raise_interrupts

NO_PICTURE = "note: no picture: matplotlib is missing; install it with pip install 'hyena-dist[plots]'"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fit|rates|widths")
    fit = commands.add_parser("fit", help="laws, best sizes, pictures: a report on a sweep or on somebody's CSV")
    rates = commands.add_parser("rates", help="the best learning rate of each width, and the rule through them")
    for made in (fit, rates):
        made.add_argument("source", help="directory of a sweep, or a CSV with a line for each run")
        made.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN",
                          help="what a CSV calls params, tokens, loss, flops, ...; may be given several times")
        made.add_argument("--min-steps", type=int, default=0, metavar="N", help="leave out runs of fewer steps (0)")
    fit.add_argument("--floor", type=float, metavar="E", help="the loss of a perfect model, where it is known from "
                     "larger runs on the same data: for sweeps too small to fit it")
    fit.add_argument("--budget", type=float, action="append", default=[], metavar="FLOPS",
                     help="say the best size for these operations; may be given several times")
    widths = commands.add_parser("widths", help="coordinate check: activations and their changes over widths")
    widths.add_argument("--shards", required=True, metavar="DIR", help="bases to train on")
    widths.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="D",
                        help="(64 128 256 512)")
    widths.add_argument("--steps", type=int, default=20, help="of training (20)")
    widths.add_argument("--lr", type=float, default=2e-3, help="learning rate at the smallest width (2e-3)")
    for made in (fit, rates, widths):
        made.add_argument("--out", required=True, metavar="DIR", help="where the report is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    raise_interrupts()
    commands = {"fit": _fit, "rates": _rates, "widths": _widths}
    return exit_status(lambda: commands[args.command](args))


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the command is about, by its arguments."""
    from hyena_dist.tasks.scaling.points import read_points

    if args.min_steps < 0:
        raise ConfigError(f"--min-steps {args.min_steps}: runs have no fewer than 0 steps: give 0 or more")
    return read_points(args.source, _columns(args))


def _columns(args: argparse.Namespace) -> dict[str, str]:
    for pair in args.column:
        if not all(pair.partition("=")):
            raise ConfigError(f"--column {pair}: is not of the form NAME=COLUMN, as in --column loss=val_loss")
    return dict(pair.split("=", 1) for pair in args.column)


def _fit(args: argparse.Namespace) -> None:
    from hyena_dist.tasks.scaling.report import report  # scipy takes a second, --help should not

    found, files = report(_rows(args), Path(args.out), min_steps=args.min_steps,
                          floor=args.floor, budgets=args.budget, title=f"Scaling report: {Path(args.source).name}")
    for fitted in found.fits:
        for axis, exponent, interval in zip(fitted.law.axes, fitted.law.exponents, fitted.trust.exponents, strict=True):
            said = (f"{interval.low:.3f} to {interval.high:.3f}" if interval.identified
                    else f"not identified: {interval.reason}")
            print(f"{fitted.name}: exponent of {axis} {exponent:.4f} ({said})")
    for warning in found.warnings:
        print(f"warning: {warning}")
    print(f"written: {', '.join(map(str, files))}")


def _rates(args: argparse.Namespace) -> None:
    from hyena_dist.tasks.scaling.learning_rate import describe, draw_rates, learning_rate_rule
    from hyena_dist.tasks.scaling.points import choose

    points, left = choose(_rows(args), min_steps=args.min_steps)
    rule = learning_rate_rule(points)
    out = _directory(args.out)
    text = describe(rule) + "".join(f"\nLeft out: {item.id}: {item.reason}.\n" for item in left)
    _write(out / "rates.md", text)
    try:
        draw_rates(rule, out / "rates.png")
    except ImportError:
        print(NO_PICTURE, file=sys.stderr)


def _widths(args: argparse.Namespace) -> None:
    from hyena_dist.tasks.scaling.widths import RULES, check_widths, describe, draw_widths

    if args.steps < 1 or not 0 < args.lr < float("inf"):
        raise ConfigError(f"--steps {args.steps} --lr {args.lr:g}: give numbers greater than 0")
    out = _directory(args.out)
    checks = [check_widths(args.shards, rule, args.widths, steps=args.steps, lr=args.lr) for rule in RULES]
    _write(out / "widths.md", describe(checks, args.steps))
    try:
        draw_widths(checks, out / "widths.png", args.steps)
    except ImportError:
        print(NO_PICTURE, file=sys.stderr)


def _directory(path: str) -> Path:
    from hyena_dist.runtime.files import writing

    out = Path(path)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _write(path: Path, text: str) -> None:
    from hyena_dist.runtime.files import write_whole

    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(text)
    print(f"written: {path}")
