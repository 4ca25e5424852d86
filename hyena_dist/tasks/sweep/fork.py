"""A branch of one run as a point of its own: one long run gives several budgets."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from hyena_dist.checkpoint.directory import open_checkpoint
from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.config.load import load_config
from hyena_dist.config.plain import open_regular, read_object
from hyena_dist.tasks.sweep.expand import forked
from hyena_dist.tasks.sweep.file import Sweep
from hyena_dist.tasks.sweep.places import RESOLVED
from hyena_dist.tasks.sweep.point import POINTS, RUN, Point, located
from hyena_dist.tasks.sweep.state import STATE, read_state
from hyena_dist.train.run_directory import SUMMARY


def fork_point(run: Path, *, at: int, cooldown: int, out: Path | None = None, launch: str = "") -> tuple[Point, Sweep]:
    """The branch of a run at a step, and how it is started.

    Args:
        run: a run directory, or the directory of a point.
        out: directory of the branch; None: among the points of the sweep that the run is of, else beside the run.
        launch: what starts its ranks; empty: as the sweep that the run is of, else one process.

    Raises:
        UserError: there is no such run or checkpoint, it cannot be branched there, or only `launch` can say what starts
            it.
    """
    run_dir = run / RUN if (run / STATE).exists() else run
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run directory (it has no config.yaml): give that of a run or of a point")
    config = load_config(run_dir / "config.yaml", [f"train.run_dir={run_dir}"])
    state = read_state(run_dir.parent) if run_dir.name == RUN else None
    parent = Point(id=state["id"] if state else str(run_dir), config=config, set=state["set"] if state else {})
    in_sweep = state is not None and run_dir.parent.parent.name == POINTS
    words, ranks = tuple(shlex.split(launch)), 1
    if words:
        ranks = _ranks(run_dir, config.parallel.tensor * config.parallel.context)
    elif in_sweep:
        words, ranks = launch_of(run_dir.parent.parent.parent / RESOLVED)
    point = forked(parent, at=at, cooldown=cooldown, ranks=ranks)
    assert point.config.train.origin is not None
    open_checkpoint(point.config.train.origin)
    if out is None and in_sweep:
        point = located(point, run_dir.parent.parent.parent)
    else:
        out = run_dir.with_name(f"{run_dir.name}-fork-{at}-{cooldown}") if out is None else out
        point = replace(point, config=replace(point.config, train=replace(point.config.train, run_dir=str(out / RUN))))
    sweep = Sweep(path=run_dir / "config.yaml", base=str(run_dir / "config.yaml"), runs=point.directory,
                  launch=words, ranks=ranks)
    return point, sweep


_LAUNCHERS = ("torchrun", "deepspeed")
_COUNTS = re.compile(r"--(nproc[-_]per[-_]node|nnodes|num_gpus|master[-_]port)=([0-9]+|\{port\})|--standalone")


def launch_of(resolved: Path) -> tuple[tuple[str, ...], int]:
    """What starts the ranks of a sweep's points, and how many these are. Whoever made the directory has written it, and
    any word may be a program or name one: only a launcher with nothing but counts is taken.

    Raises:
        ConfigError: the file is not what a sweep leaves, or what it starts the ranks with is for the user to say.
    """
    try:
        with open_regular(resolved) as stream:
            content = yaml.safe_load(stream)
        words, ranks = content["launch"], content["ranks"]
        if type(words) is not list or {type(word) for word in words} - {str} or type(ranks) is not int or ranks < 1:
            raise ValueError("launch is no list of words, or ranks no number of ranks")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{resolved}: cannot be read ({one_line(error)}): run the sweep again, which writes it, or "
                          "give --launch") from error
    if words and not (words[0] in _LAUNCHERS and all(map(_COUNTS.fullmatch, words[1:]))):
        raise ConfigError(f"{resolved}: launch has words that may be any program, and is not taken from a file beside "
                          f"the run: {shlex.join(words)!r:.200}: give --launch with what starts {ranks} ranks")
    return tuple(words), ranks


def _ranks(run_dir: Path, fewest: int) -> int:
    """How many ranks the run had."""
    try:
        ranks = read_object(run_dir / SUMMARY).get("world_size")
    except (OSError, ValueError):
        ranks = None
    return ranks if type(ranks) is int and ranks > 0 else fewest
