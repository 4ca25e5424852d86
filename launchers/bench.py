"""Measure this project against what it replaces, all sides in one run on the same inputs.

examples: python launchers/bench.py step --lengths 1024 4096 16384 --out benchmarks/results
          python launchers/bench.py step --roofline --layers 8 --width 256 --lengths 1048576 --dtype bf16
"""

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it
warnings.filterwarnings("ignore", module=r"megatron\.")  # here: the processes that cp starts read this file too


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


OPTIONS: dict[str, dict[str, Any]] = {
    "lengths": {"type": count, "nargs": "+", "metavar": "L", "help": "tokens of a sequence, one comparison each"},
    "length": {"type": count, "metavar": "L", "help": "tokens of the sequence"},
    "width": {"type": count, "metavar": "D", "help": "channels"},
    "layers": {"type": count, "metavar": "N", "help": "layers of the model"},
    "tokens": {"type": count, "metavar": "T", "help": "tokens of a micro-batch of as many sequences as fit"},
    "batch": {"type": count, "metavar": "B", "help": "sequences of a micro-batch, in place of --tokens"},
    "dtype": {"choices": ("fp32", "bf16", "fp16"), "help": "precision of activations"},
    "device": {"choices": ("auto", "cpu", "cuda", "meta"),
               "help": "where; auto is a GPU if there is one, meta nowhere, to count for step --roofline"},
    "threads": {"type": count, "metavar": "N", "help": "threads of torch on a CPU"},
    "rounds": {"type": count, "metavar": "N", "help": "turns of each side; medians are reported"},
    "ranks": {"type": count, "nargs": "+", "metavar": "P",
              "help": "numbers of ranks, one process each; one rank is always measured"},
    "processes": {"type": count, "metavar": "P", "help": "ranks that share the work, one thread each"},
    "variants": {"type": count, "metavar": "N", "help": "how many are scored"},
    "going_on_in": {"type": Path, "metavar": "DIR",
                    "help": "score them once, with the inputs and what is scored in DIR, where a call that is killed "
                            "goes on when it is given again; against the forward passes of a sample"},
    "memory_of": {"type": count, "nargs": "*", "metavar": "N",
                  "help": "numbers of variants whose peak memory is measured, each in a process of its own"},
}
FLAGS = {"dry_run": "print sizes and estimated memory; nothing is measured",
         "roofline": "count bytes, operations and launches of every part of our step, against the fewest and the time "
                     "that a card needs for these; measured too where there is a GPU"}
TEXTS = ("side", "size", "method", "part")

Measure = Callable[[argparse.Namespace], dict[str, Any]]
Problem = Callable[[argparse.Namespace], str | None]


def _no_problem(_args: argparse.Namespace) -> str | None:
    return None


def _ranks_fit(args: argparse.Namespace) -> str | None:
    for ranks in args.ranks:
        if args.length % ranks**2 or args.width % ranks:
            return (f"{ranks} ranks need a --length that is a multiple of {ranks**2} and a --width that is one of "
                    f"{ranks}, got {args.length} and {args.width}")
    return None


def _goes_on(args: argparse.Namespace) -> str | None:
    if args.going_on_in is None:
        return None
    from benchmarks import long_scoring, scoring
    said = long_scoring.problem(scoring.Size(args.length, args.width, args.layers), args.variants, args.going_on_in)
    return said and f"--going-on-in {said}"


def _has_device(args: argparse.Namespace) -> str | None:
    import torch
    roofline = getattr(args, "roofline", False)
    if args.device == "meta" and not roofline:
        return "--device meta: nothing can be measured there: use cpu or cuda, or count with step --roofline"
    if roofline and (args.device == "cpu" or args.dry_run):
        return ("--roofline counts what a GPU would do: leave out --dry-run, and use --device meta, or cuda where "
                "it is to be measured too")
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU here: use --device cpu"
    if args.subject == "step" and args.width % 2:
        return f"--width {args.width} is odd: the Transformer's heads need an even number of channels"
    if min(args.lengths) < 2:
        return "--lengths must be at least 2"
    return None


def _cuda(args: argparse.Namespace) -> bool:
    import torch
    return args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())


def _table(args: argparse.Namespace, found: Sequence[Any], *, cuda: bool = False) -> dict[str, Any]:
    """Print the rows, and return what the result file holds."""
    rows = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row._asdict() for row in found]
    _print(args.subject, [{key: value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1e4
                           else f"{value:,.0f}" for key, value in row.items()} for row in rows])
    return {"machine": _machine(cuda), "rows": rows}


def _loader(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import loader
    return _table(args, loader.run(rounds=args.rounds))


def _help(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import start
    return _table(args, start.run(rounds=args.rounds))


def _start(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import start
    return _table(args, start.run_banner(rounds=args.rounds))


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import planning
    return _table(args, planning.run(rounds=args.rounds))


def _cp(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import cp
    ranks = tuple(args.ranks)
    found = cp.run(cp.Size(args.length, args.width), ranks=ranks, repetitions=args.rounds)
    return _table(args, found, cuda=cp.on_gpus(ranks))


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks import generation
    torch.set_num_threads(args.threads)
    cuda = _cuda(args)
    return _table(args, generation.run(sorted(set(args.lengths)), width=args.width, layers=args.layers,
                                       rounds=args.rounds, device=torch.device("cuda" if cuda else "cpu")), cuda=cuda)


def _scoring(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import long_scoring, scoring
    size = scoring.Size(args.length, args.width, args.layers)
    if args.going_on_in is None:
        return _table(args, scoring.run(size, variants=args.variants, ranks=args.processes, rounds=args.rounds,
                                        memory_of=args.memory_of))
    found = [*long_scoring.run(size, variants=args.variants, ranks=args.processes, directory=args.going_on_in),
             *map(scoring.memory, args.memory_of)]
    return {"subject": f"scoring-{args.variants}", **_table(args, found)}


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """Without rows of a dry run."""
    import torch

    from benchmarks import subjects
    from benchmarks.models import Size
    torch.set_num_threads(args.threads)
    cuda = _cuda(args)
    given = {"batch": None, "tokens": 1, "layers": 1, "dtype": "fp32", **vars(args)}  # not every subject has these
    sizes = [Size(length, args.width, given["batch"] or max(1, given["tokens"] // length), given["layers"])
             for length in sorted(set(args.lengths))]
    if given.get("roofline"):
        return _roofline(sizes, given["dtype"], cuda)
    plan = subjects.Plan(args.subject, sizes, torch.device("cuda" if cuda else "cpu"), given["dtype"], args.rounds)
    if args.dry_run:
        _print(f"{args.subject}: estimated peak memory of tensors", subjects.estimate(plan))
        return {"rows": []}
    machine = _machine(cuda)
    result = {"machine": machine, **subjects.run(plan)}
    _print(f"{args.subject} on {machine['device']}", [subjects.shown(row) for row in result["rows"] if row["seconds"]])
    for note in subjects.notes(result["rows"]):
        print(note)
    copy = result["copy_bytes_per_second"] / 1e9
    print(f"ratios: times that of {result['rows'][0]['side']}; a copy moves {copy:.1f} GB/s here")
    for side, grown in result["growth"].items():
        print(f"{side}: time per token grows {grown:.2f} times as much as log L, from the shortest to the longest L")
    if "cost" in result:
        from benchmarks import lengths
        print("\n".join(lengths.said(result["cost"])))
    return result


def _roofline(sizes: Sequence[Any], precision: str, cuda: bool) -> dict[str, Any]:
    import torch

    from benchmarks import roofline
    machine = _machine(cuda)
    result = {"machine": machine, **roofline.report(sizes, precision, torch.device("cuda" if cuda else "meta"))}
    card = roofline.card_of(machine["device"]) if cuda else None
    _print(f"roofline of a step, {precision}" + (f", measured on {machine['device']}" if cuda else ""),
           [roofline.shown(row, card) for row in result["rows"]])
    for step in result["steps"]:
        print(roofline.note(step))
    return result


def _machine(cuda: bool) -> dict[str, Any]:
    import torch

    from hyena_dist.config.versions import library_version, own_version
    packages = ("torch", "numpy", "scipy", "megatron-core")
    return {"device": torch.cuda.get_device_name() if cuda else _processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            "date": str(date.today()), **{name: library_version(name) for name in packages},
            "hyena-dist": own_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _print(title: str, rows: Sequence[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    table = Table(title=title, title_justify="left")
    columns = [key for key in rows[0] if any(row.get(key) for row in rows)]
    for key in columns:
        table.add_column(key.replace("_", " "), justify="left" if key in TEXTS else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(key, "") for key in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@dataclass(frozen=True)
class Subject:
    """A command: its help, and the default of every option it has."""

    help: str
    measure: Measure
    """Prints, and returns what the result file holds; raises AssertionError or ValueError: values are wrong."""
    defaults: dict[str, Any]
    flags: tuple[str, ...] = ()
    picture: bool = True
    needs: tuple[str, ...] = ()
    """Modules of the extra 'dev'."""
    problem: Problem = _no_problem
    """What no single option is to blame for."""


def _comparison(help_: str, *flags: str, **defaults: Any) -> Subject:
    batch = {"batch": None} if "tokens" in defaults else {}
    return Subject(help_, _compare, {"rounds": 5, **defaults, **batch, "device": "auto", "threads": 2},
                   ("dry_run", *flags), problem=_has_device)


SUBJECTS = {
    "conv": _comparison("the long convolution against plain torch.fft code, and cuDNN's and FlashFFTConv where they "
                        "are installed",
                        lengths=[2**10, 2**12, 2**14, 2**16, 2**18, 2**20], width=16, tokens=2**18, dtype="fp32"),
    "filter": _comparison("the implicit filter against plain code, in float32",
                          lengths=[2**10, 2**12, 2**14, 2**16, 2**18], width=32),
    "mixer": _comparison("a whole Hyena mixer against the frozen plain one",
                         lengths=[2**10, 2**12, 2**14, 2**16, 2**18], width=32, tokens=2**16, dtype="fp32"),
    "step": _comparison("a training step against the frozen plain one and a Transformer of the same size", "roofline",
                        lengths=[2**10, 2**12, 2**14, 2**16], width=32, layers=2, tokens=2**14, dtype="fp32"),
    "memory": _comparison("memory and time of a step for each value of train.activation_checkpointing",
                          lengths=[2**14], width=64, layers=4, tokens=2**14, rounds=3, dtype="fp32"),
    "generate": Subject("time of a generated base with a memory, against a forward pass over all before it", _generate,
                        {"rounds": 3, "lengths": [256, 1024, 4096], "width": 256, "layers": 8, "device": "auto",
                         "threads": 2}, problem=_has_device),
    "loader": Subject("windows per second on one core against the published reading pattern", _loader,
                      {"rounds": 5}, picture=False, needs=("pyfaidx",)),
    "help": Subject("seconds of CPU in which each command answers --help", _help, {"rounds": 5}, picture=False),
    "start": Subject("seconds from the start of a rank to the end of its banner", _start, {"rounds": 5},
                     picture=False),
    "plan": Subject("seconds of a step on the CPU against those of a plan, after its probe", _plan,
                    {"rounds": 3}, picture=False),
    "cp": Subject("bytes, peak memory and time of a rank against the number of context ranks", _cp,
                  {"rounds": 3, "length": 65536, "width": 64, "ranks": [1, 2, 4, 8]}, problem=_ranks_fit),
    "scoring": Subject("seconds of `score variants` against the bare forward passes of its windows, and its memory "
                       "against the number of variants", _scoring,
                       {"rounds": 3, "length": 1024, "width": 128, "layers": 2, "variants": 600, "processes": 2,
                        "memory_of": [1000, 10000], "going_on_in": None},
                       picture=False, problem=_goes_on),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        command = commands.add_parser(name, help=subject.help, description=subject.help)
        for option, default in subject.defaults.items():
            keywords = dict(OPTIONS[option])
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            keywords["help"] += "" if default is None else f" ({shown})"
            command.add_argument(f"--{option.replace('_', '-')}", default=default, **keywords)
        for flag in subject.flags:
            command.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=FLAGS[flag])
        command.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/SUBJECT-SIZE-DATE.json"
                             + (" and its picture, .png" if subject.picture else ""))
    args = parser.parse_args(argv)
    if problem := SUBJECTS[args.subject].problem(args):
        commands.choices[args.subject].error(problem)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when values are wrong and no time is reported, 2 a mistake of the user's."""
    args = parse_args(argv)
    subject = SUBJECTS[args.subject]
    needed = [*subject.needs, *(["matplotlib"] if subject.picture and args.out else [])]
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        print(f"error: {missing[0]} is missing: install it with pip install 'hyena-dist[dev]'", file=sys.stderr)
        return 2
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)  # before the minutes that measuring takes
    except OSError as error:
        print(f"error: --out {args.out}: cannot be made ({error.strerror}): choose another directory", file=sys.stderr)
        return 2
    try:
        result = subject.measure(args)
    except (AssertionError, ValueError) as error:
        print(f"error: nothing is reported, the values are wrong: {error}", file=sys.stderr)
        return 1
    if args.out and result["rows"]:
        _write(args, result)
    return 0


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    size = f"-{result['size']['layers']}x{result['size']['width']}" if "size" in result else ""
    subject = result.get("subject", args.subject)
    path = args.out / f"{subject}{size}-{date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    if SUBJECTS[args.subject].picture and subject == args.subject:
        from benchmarks import cp, generation, picture
        print({"cp": cp, "generate": generation}.get(args.subject, picture).draw(path))
    if "cost" in result:
        from benchmarks import lengths
        print(lengths.draw(result, path.with_name(f"{path.stem}-cost.png")))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
