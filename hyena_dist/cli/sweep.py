"""Many runs as one: points over any keys of the configuration, with exact costs; killed and started again at will.

examples: python launchers/sweep.py plan --config configs/sweeps/tiny.yaml
          python launchers/sweep.py run --config configs/sweeps/tiny.yaml --jobs 2
          python launchers/sweep.py status --config configs/sweeps/tiny.yaml --watch
          python launchers/sweep.py report --config configs/sweeps/tiny.yaml
          python launchers/sweep.py fork runs/long --at 8000 --cooldown 2000
          sbatch --array=0-3 launchers/slurm/sweep.sbatch --config configs/sweeps/tiny.yaml
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import one_line
from hyena_dist.runtime.signals import EXIT_REQUEUE, PROCESS, raise_interrupts

if TYPE_CHECKING:
    from hyena_dist.tasks.sweep.file import Sweep
    from hyena_dist.tasks.sweep.point import Point
    from hyena_dist.tasks.sweep.state import State

COMMANDS = {
    "plan": "its points with their exact costs; runs nothing, writes nothing",
    "run": "run what is not finished; started again, it goes on where it was killed",
    "status": "how far the points are, from their files",
    "report": "tables, fits and pictures of what is finished",
    "fork": "branch a run with all of its state into a cool-down of its own",
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="The keys of a sweep's file are in docs/sweeps.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    made = {name: commands.add_parser(name, help=what, description=what.capitalize() + ".")
            for name, what in COMMANDS.items()}
    for name in ("plan", "run", "status", "report"):
        made[name].add_argument("--config", required=True, metavar="YAML", help="the sweep's file")
    made["plan"].add_argument("--slurm", action="store_true", help="print the command that runs it as a job array, too")
    made["run"].add_argument("--jobs", type=_jobs, default=1, metavar="N", help="points at a time on this machine (1)")
    made["run"].add_argument("--retry", action="store_true", help="run the points again that have failed or diverged")
    which = made["run"].add_mutually_exclusive_group()
    which.add_argument("--only", metavar="ID", action="append", help="this point alone; may be given several times")
    which.add_argument("--index", type=int, metavar="I", help="the I-th point of the plan, from 0, with its forks")
    made["status"].add_argument("--watch", action="store_true", help="a live table, until all points have ended")
    made["report"].add_argument("--out", metavar="DIR", help="where to write the report (report, in the sweep's runs)")
    fork = made["fork"]
    fork.add_argument("run", metavar="RUN", help="a run directory, or that of a point of a sweep")
    fork.add_argument("--at", type=int, required=True, metavar="STEP", help="its checkpoint to begin with")
    fork.add_argument("--cooldown", type=int, required=True, metavar="STEPS", help="steps of the cool-down")
    fork.add_argument("--out", metavar="DIR", help="directory of the branch; of a point's run it is a new point")
    fork.add_argument("--launch", default="", metavar="WORDS", help="what starts its ranks, as 'torchrun "
                      "--nproc-per-node=2'; without it as the sweep of the run where that is torchrun or deepspeed, "
                      "else one process")
    return parser.parse_args(argv)


def _jobs(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a point has failed or diverged, 2 a mistake of the user's, 85 stopped before its end, 130
    or 143 interrupted."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # its chatter about optional parts
    warnings.filterwarnings("ignore", module=r"megatron\.")
    commands = {"plan": _plan, "run": _run, "status": _status, "report": _report, "fork": _fork}
    return exit_status(lambda: commands[args.command](args))


def _plan(args: argparse.Namespace) -> int:
    # Imported here: torch takes seconds, --help should not.
    from hyena_dist.cli.sweep_tables import print_plan
    from hyena_dist.tasks.sweep.expand import expand
    from hyena_dist.tasks.sweep.file import read_sweep
    from hyena_dist.tasks.sweep.point import costs, shards_problem
    from hyena_dist.tasks.sweep.state import read_states

    raise_interrupts()
    sweep = read_sweep(args.config)
    points = expand(sweep)
    found = {point.id: costs(point.config, ranks=sweep.ranks) for point in points if point.problem is None}
    print_plan(points, found, read_states(sweep.runs))
    roots = [point for point in _roots(points) if point.problem is None]
    for problem in dict.fromkeys(shards_problem(point.config) for point in points if point.problem is None):
        if problem is not None:
            print(f"warning: {one_line(problem)}: until they are there ids, unique tokens and epochs are not known",
                  file=sys.stderr)
    if args.slurm:
        print(f"sbatch --array=0-{max(len(roots) - 1, 0)} launchers/slurm/sweep.sbatch --config {args.config}")
    return 2 if _refused(sweep, points) else 0


def _refused(sweep: "Sweep", points: "Sequence[Point]") -> bool:
    """Whether the sweep cannot run for its points that cannot; each of those is a line."""
    word = "error" if sweep.invalid == "refuse" else "skipped"
    bad = [point for point in points if point.problem is not None]
    for point in bad:
        print(f"{word}: {sweep.path}: point {point.id}: {point.problem}", file=sys.stderr)
    return bool(bad) and word == "error"


def _roots(points: "Sequence[Point]") -> "list[Point]":
    return [point for point in points if point.forked_from is None]


def _run(args: argparse.Namespace) -> int:
    from hyena_dist.cli.sweep_tables import Board
    from hyena_dist.config.errors import ConfigError
    from hyena_dist.tasks.sweep.expand import expand
    from hyena_dist.tasks.sweep.file import read_sweep
    from hyena_dist.tasks.sweep.places import prepare, write_resolved
    from hyena_dist.tasks.sweep.point import shards_problem
    from hyena_dist.tasks.sweep.runner import Runner

    sweep = read_sweep(args.config)
    points = expand(sweep)
    if _refused(sweep, points):
        return 2
    points = [point for point in points if point.problem is None]
    for problem in filter(None, (shards_problem(point.config) for point in points)):
        raise ConfigError(problem)
    chosen = _chosen(args, points)
    states = prepare(points, sweep)
    write_resolved(sweep, points)
    own = not PROCESS.installed and PROCESS.install() is PROCESS
    try:
        with Board(chosen) as board:
            runner = Runner(sweep, jobs=args.jobs, retry=args.retry, stop=lambda: PROCESS.reason, watch=board.show)
            states = runner.run(chosen, states)
    finally:
        if own:
            PROCESS.uninstall()
            PROCESS.reason = None
    return _said(chosen, states, runner.busy)


def _chosen(args: argparse.Namespace, points: "list[Point]") -> "list[Point]":
    """The points that are asked for.

    Raises:
        ConfigError: one of them is not there.
    """
    from hyena_dist.config.errors import ConfigError
    if args.only:
        known = {point.id: point for point in points}
        if missing := [name for name in args.only if name not in known]:
            raise ConfigError(f"--only {missing[0]}: {args.config} has no such point: use one of {', '.join(known)}")
        return [point for point in points if point.id in args.only]
    if args.index is None:
        return points
    roots = _roots(points)
    if not 0 <= args.index < len(roots):
        raise ConfigError(f"--index {args.index}: {args.config} has points 0 to {len(roots) - 1}")
    root = roots[args.index]
    return [root, *(point for point in points if point.forked_from == root.id)]


def _said(points: "list[Point]", states: "dict[str, State]", busy: list[str]) -> int:
    """Print how the points ended, and give the exit status."""
    from hyena_dist.cli.sweep_tables import print_states
    shown = [states[point.id] for point in points]
    print_states(shown)
    for name in busy:
        print(f"note: point {name} is run by somebody else at the moment", file=sys.stderr)
    failed = [state for state in shown if state["status"] in ("failed", "diverged")]
    for state in failed:
        print(f"{state['status']}: point {state['id']}: {state['error']}: --retry runs it again", file=sys.stderr)
    if any(state["status"] in ("planned", "running") and state["id"] not in busy for state in shown):
        print("not all points have ended: the same command goes on", file=sys.stderr)
        return EXIT_REQUEUE
    return 1 if failed else 0


def _status(args: argparse.Namespace) -> int:
    from hyena_dist.cli.sweep_tables import Board, print_states
    from hyena_dist.config.errors import ConfigError
    from hyena_dist.tasks.sweep.file import read_sweep
    from hyena_dist.tasks.sweep.state import read_states

    raise_interrupts()
    sweep = read_sweep(args.config)
    states = read_states(sweep.runs)
    if not states:
        raise ConfigError(f"{sweep.runs} has no points yet: `python launchers/sweep.py run --config {args.config}` "
                          "starts them")
    if not args.watch:
        print_states(states)
        return 0
    with Board(runs=sweep.runs) as board:
        while any(state["status"] in ("planned", "running") for state in read_states(sweep.runs)):
            board.show()
            time.sleep(1.0)
    print_states(read_states(sweep.runs))
    return 0


def _report(args: argparse.Namespace) -> int:
    from hyena_dist.tasks.scaling.report import write_report
    from hyena_dist.tasks.sweep.file import read_sweep

    raise_interrupts()
    sweep = read_sweep(args.config)
    for path in write_report(sweep.runs, Path(args.out) if args.out else sweep.runs / "report"):
        print(f"written: {path}")
    return 0


def _fork(args: argparse.Namespace) -> int:
    from hyena_dist.tasks.sweep.fork import fork_point
    from hyena_dist.tasks.sweep.places import prepare
    from hyena_dist.tasks.sweep.runner import Runner

    point, sweep = fork_point(Path(args.run), at=args.at, cooldown=args.cooldown, launch=args.launch,
                              out=None if args.out is None else Path(args.out))
    states = prepare([point], sweep)
    own = not PROCESS.installed and PROCESS.install() is PROCESS
    try:
        runner = Runner(sweep, retry=True, stop=lambda: PROCESS.reason)
        states = runner.run([point], states)
    finally:
        if own:
            PROCESS.uninstall()
            PROCESS.reason = None
    print(f"branch: {point.directory}")
    return _said([point], states, runner.busy)
