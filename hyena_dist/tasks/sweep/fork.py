"""A branch of one run as a point of its own: one long run gives several budgets."""

import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from hyena_dist.checkpoint.directory import open_checkpoint
from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.config.load import load_config
from hyena_dist.config.plain import read_object
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
        UserError: there is no such run or checkpoint, or it cannot be branched there.
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


def launch_of(resolved: Path) -> tuple[tuple[str, ...], int]:
    """What starts the ranks of a sweep's points, and how many these are.

    Raises:
        ConfigError: the file is not what a sweep leaves.
    """
    try:
        content = yaml.safe_load(resolved.read_text(encoding="utf-8"))
        return tuple(map(str, content["launch"])), int(content["ranks"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{resolved}: cannot be read ({one_line(error)}): run the sweep again, which writes it, or "
                          "give --launch") from error


def _ranks(run_dir: Path, fewest: int) -> int:
    """How many ranks the run had."""
    try:
        ranks = read_object(run_dir / SUMMARY).get("world_size")
    except (OSError, ValueError):
        ranks = None
    return ranks if type(ranks) is int and ranks > 0 else fewest
