"""Measure this project against what it replaces, both in one run on the same inputs.

example: python launchers/bench.py step --out benchmarks/results
"""

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it
warnings.filterwarnings("ignore", module=r"megatron\.")  # here: the processes that cp starts read this file too


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True)
    loader = subjects.add_parser("loader", help="windows per second on one core against the published reading pattern")
    loader.add_argument("--rounds", type=count, default=5, help="turns of each side; medians are reported (5)")
    step = subjects.add_parser("step", help="a training step against the frozen plain torch.fft baseline")
    step.add_argument("--rounds", type=count, default=5, help="steps of each side; medians are reported (5)")
    step.add_argument("--threads", type=count, default=2, help="threads of torch (2)")
    cp = subjects.add_parser("cp", help="bytes, peak memory and time of a rank against the number of context ranks")
    cp.add_argument("--rounds", type=count, default=3, help="timed passes of each method; medians are reported (3)")
    cp.add_argument("--length", type=count, default=65536, help="tokens of the sequence (65536)")
    cp.add_argument("--width", type=count, default=64, help="channels of the model, which has 2 layers (64)")
    cp.add_argument("--ranks", type=count, nargs="+", default=[1, 2, 4, 8], metavar="P",
                    help="numbers of ranks, one process each (1 2 4 8); one rank is always measured")
    for subject in (loader, step, cp):
        subject.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/SUBJECT-DATE.json"
                             + (" and its picture, .png" if subject is cp else ""))
    args = parser.parse_args(argv)
    if args.subject == "cp":
        for ranks in args.ranks:
            if args.length % ranks**2 or args.width % ranks:
                cp.error(f"{ranks} ranks need a --length that is a multiple of {ranks**2} and a --width that is one of "
                         f"{ranks}, got {args.length} and {args.width}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when values are wrong and no time is reported, 2 a mistake of the user's."""
    args = parse_args(argv)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)  # before the minutes that measuring takes
        if args.subject == "loader":
            import pyfaidx  # noqa: F401
        elif args.subject == "cp" and args.out:
            import matplotlib  # noqa: F401
    except OSError as error:
        print(f"error: --out {args.out}: cannot be made ({error.strerror}): choose another directory", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error.name} is missing: install it with pip install 'hyena-dist[dev]'", file=sys.stderr)
        return 2
    try:
        rows = [_plain(row) for row in _measure(args)]
    except (AssertionError, ValueError) as error:
        print(f"error: nothing is reported, the values are wrong: {error}", file=sys.stderr)
        return 1
    _print(args.subject, rows)
    if args.out:
        path = args.out / f"{args.subject}-{date.today()}.json"
        path.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")
        print(path)
        if args.subject == "cp":
            from benchmarks import cp
            print(cp.draw(path))
    return 0


def _measure(args: argparse.Namespace) -> Sequence[Any]:
    import torch
    if args.subject == "loader":
        from benchmarks import loader
        return loader.run(rounds=args.rounds)
    if args.subject == "cp":
        from benchmarks import cp
        return cp.run(cp.Size(args.length, args.width), ranks=tuple(args.ranks), repetitions=args.rounds)
    from benchmarks import step
    torch.set_num_threads(args.threads)
    return step.run(repetitions=args.rounds)


def _plain(row: Any) -> dict[str, Any]:
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else row._asdict()


def _machine() -> dict[str, Any]:
    import torch
    packages = ("torch", "numpy", "scipy", "megatron-core", "hyena-dist")
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            "date": str(date.today()), **{name: version(name) for name in packages}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _print(subject: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    table = Table(title=f"{subject} on {_machine()['device']}", title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="left" if isinstance(rows[0][key], str) else "right",
                         overflow="fold")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
                        for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
