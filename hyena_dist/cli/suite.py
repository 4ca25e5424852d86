"""Fine-tune a model on every task of a published suite of benchmarks, and write one table beside published numbers.

suites:   caduceus-gb     Genomic Benchmarks, as Caduceus runs them
          hyenadna-gb     Genomic Benchmarks, as HyenaDNA does, without its choice by the test part
          caduceus-nt     tasks of the Nucleotide Transformer, the original and the revised collection
          gue-dnabert2    GUE, the 28 data sets of DNABERT-2
          lrb             Genomics Long-Range Benchmark, at any --length
          dnalongbench    DNALONGBENCH, with its true validation split

examples: python launchers/suite.py gue-dnabert2 --data GUE --from runs/mine --dry-run
          python launchers/suite.py caduceus-gb --data ~/.genomic_benchmarks --from runs/mine --out runs/mine-gb
          hyena-dist suite gue-dnabert2 --data GUE --from runs/mine --tasks mouse/0 mouse/2 finetune.epochs=10
          python launchers/suite.py lrb --data lrb --from runs/mine --length 32768 \\
              --launch 'torchrun --nproc-per-node=8' parallel.context=8 train.micro_batch_size=1
"""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.runtime.signals import EXIT_REQUEUE, PROCESS

if TYPE_CHECKING:
    from hyena_dist.tasks.suites.description import Task
    from hyena_dist.tasks.suites.runner import Runner
    from hyena_dist.tasks.suites.table import Row


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Nothing is downloaded: a file that is not there is named with the place where its authors publish it. "
               "The same command goes on where it was killed. The table is in --out (docs/suites.md).")
    parser.add_argument("name", metavar="SUITE", help="one of those above")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="keys that replace the protocol's; the table says so")
    parser.add_argument("--data", required=True, metavar="DIR", help="the files, as their authors publish them")
    parser.add_argument("--from", required=True, dest="model", metavar="MODEL",
                        help="a run, a checkpoint, or a directory of published weights")
    parser.add_argument("--out", metavar="DIR", help="where all is written (runs/SUITE)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; without it all whose files are there")
    parser.add_argument("--length", type=int, metavar="BASES", help="of a window, where the suite leaves that to you")
    parser.add_argument("--most", type=int, metavar="N", help="training sequences of a task, drawn at random (all)")
    parser.add_argument("--config", default="finetune/suite", metavar="YAML",
                        help="configuration that the protocol's keys are put on (finetune/suite)")
    parser.add_argument("--launch", default="", metavar="WORDS", help="what starts the ranks of a run, as 'torchrun "
                        "--nproc-per-node=8'; without it one process")
    parser.add_argument("--dry-run", action="store_true", help="read the files, say what would be run, write nothing")
    args = parser.parse_intermixed_args(argv)
    args.overrides += [word for word in args.tasks or [] if "=" in word]  # of keys behind the tasks
    args.tasks = [word for word in args.tasks or [] if "=" not in word]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a run has failed, 2 a mistake of the user's, 85 stopped before its end, 130
    interrupted."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # its chatter about optional parts
    warnings.filterwarnings("ignore", module=r"megatron\.")
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    # Imported here: some of it takes seconds, --help should not.
    from hyena_dist.runtime.run_lock import InUse, RunLock
    from hyena_dist.tasks.suites import SUITES
    from hyena_dist.tasks.suites.runner import SUITE, Runner, Stopped
    from hyena_dist.tasks.suites.settings import changes_of

    if args.name not in SUITES:
        raise ConfigError(f"there is no suite {args.name!r}: use one of {', '.join(SUITES)}")
    suite = SUITES[args.name]
    if args.length is not None:
        if args.length < 1:
            raise ConfigError(f"--length {args.length}: must be at least 1")
        suite = suite.of_length(args.length)
    if args.most is not None and args.most < 2:
        raise ConfigError(f"--most {args.most}: must be at least 2")
    tasks = [suite.task(name) for name in dict.fromkeys(args.tasks)] if args.tasks else list(suite.tasks)
    if not Path(args.data).is_dir():
        raise ConfigError(f"--data {args.data}: there is no such directory: {suite.where}")
    runner = Runner(suite, args.model, Path(args.data), Path(args.out or f"runs/{suite.name}"), args.config,
                    changes_of(args.overrides), shlex.split(args.launch), args.most, stop=lambda: PROCESS.reason)
    _check(runner, tasks)
    if not args.dry_run or (runner.out / SUITE).exists():
        runner.content, runner.start = _content(runner)
    if args.dry_run:
        runner.check_same()
        return _dry_run(runner, tasks, asked=bool(args.tasks))
    try:
        runner.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {runner.out}: no such directory can be made ({error.strerror}): give another") \
            from None
    try:
        lock = RunLock(runner.out)
    except InUse:
        raise ConfigError(f"--out {runner.out}: another suite runs in it: wait for its end, stop it, or give another") \
            from None
    own = not PROCESS.installed and PROCESS.install() is PROCESS
    try:
        rows = runner.run(tasks, asked=bool(args.tasks))
    except Stopped:
        print(f"stopped ({PROCESS.reason}): the same command goes on", file=sys.stderr)
        return EXIT_REQUEUE
    finally:
        lock.release()
        if own:
            PROCESS.uninstall()
            PROCESS.reason = None
    return _said(runner, rows)


def _check(runner: "Runner", tasks: "list[Task]") -> None:
    """Raises UserError: the model is not there, or a key of the command cannot be set."""
    from hyena_dist.cli.finetune import NOT_READ
    from hyena_dist.config.load import load_config
    from hyena_dist.config.presets import find
    from hyena_dist.tasks.suites.settings import arguments_of, points_of

    if not Path(runner.model).exists():
        raise ConfigError(f"--from {runner.model}: there is no such file or directory: give a run, a checkpoint, or a "
                          "directory of published weights")
    point = points_of(runner.suite, runner.changes)[0]
    kinds = {(frozenset(task.keys), task.keys.get("finetune.task")): task for task in tasks}  # others differ in numbers
    for task in kinds.values():
        load_config(find(runner.config), [f"finetune.from={runner.model}", *arguments_of(
            runner.suite, task, point, runner.changes, None)], base=NOT_READ)


def _content(runner: "Runner") -> tuple[dict[str, Any], str]:
    """What the model and the configuration hold (`Runner.content`), and where the model was found. Of the protocol
    it has the keys of the first task that can be run.

    Raises:
        UserError: there is no model.
    """
    from hyena_dist.cli.finetune import NOT_READ
    from hyena_dist.config.identity import identity
    from hyena_dist.config.load import load_config
    from hyena_dist.config.presets import find
    from hyena_dist.convert.start import read_start
    from hyena_dist.model.trained import tensors_digest
    from hyena_dist.tasks.suites.settings import arguments_of, points_of

    section, weights, where = read_start(runner.model)
    task = next(task for task in runner.suite.tasks if not task.lacks)
    point = points_of(runner.suite, runner.changes)[0]
    config = load_config(find(runner.config), [f"finetune.from={runner.model}", *arguments_of(
        runner.suite, task, point, runner.changes, None)], base=NOT_READ)
    dropouts = {key: getattr(config.model, key) for key in ("embed_dropout", "resid_dropout")}
    return {"weights": tensors_digest(weights),
            "configuration": identity(replace(config, model=replace(section, **dropouts)))}, str(where)


def _dry_run(runner: "Runner", tasks: "list[Task]", *, asked: bool) -> int:
    """Say what is there and what would be run."""
    from hyena_dist.data.errors import DataError
    from hyena_dist.tasks.suites.description import MissingFiles
    from hyena_dist.tasks.suites.prepare import look
    from hyena_dist.tasks.suites.runner import RESULT
    from hyena_dist.tasks.suites.settings import points_of

    missing: list[str] = []
    status, points = 0, points_of(runner.suite, runner.changes)
    print(f"protocol {runner.suite.name}: {runner.suite.protocol}")
    for task in tasks:
        if task.lacks:
            print(f"{task.name}: left out: this project does not have {task.lacks}")
            continue
        try:
            found = look(runner.suite, task, runner.data)
        except DataError as error:
            refused = asked or not isinstance(error, MissingFiles)
            status = 2 if refused else status
            if refused:
                print(f"{task.name}: error: {one_line(error)}", file=sys.stderr)
            else:
                missing.append(task.name)
            continue
        done = sum((runner.out / task.name / point.name / RESULT).is_file() for point in points)
        sizes = ", ".join(f"{count:,} {name}" for name, count in found.sizes.items())
        print(f"{task.name}: {sizes}; at most {found.longest:,} bases; labels {', '.join(found.classes)}; "
              f"{task.metric}; {len(points)} settings, {done} of them done")
        for note in found.notes:
            print(f"{task.name}: note: {note}")
    if missing:
        print(f"missing: the files of {', '.join(missing)}: {runner.suite.where}")
    return status


def _said(runner: "Runner", rows: "list[Row]") -> int:
    """Say how the tasks ended, and give the exit status."""
    from hyena_dist.tasks.suites.table import MARKDOWN

    for row in rows:
        if row.state not in ("done", "missing"):
            print(f"{row.state}: {row.task}: {row.said}", file=sys.stderr)
    if missing := [row.task for row in rows if row.state == "missing"]:
        print(f"missing: the files of {', '.join(missing)}: {runner.suite.where}", file=sys.stderr)
    print(f"{sum(row.state == 'done' for row in rows)} of {len(rows)} tasks have a result; written: "
          f"{runner.out / MARKDOWN}")
    if all(row.state == "missing" for row in rows if row.state != "left out"):
        print(f"error: --data {runner.data}: has the files of no task: {runner.suite.where}", file=sys.stderr)
        return 2
    if any(row.state == "refused" for row in rows):
        return 2
    return 1 if any(row.state == "failed" for row in rows) else 0
