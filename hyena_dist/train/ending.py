"""What the first rank writes when a run ends: the marker of a run that is to be started again, or the summary."""

import logging
from pathlib import Path

from hyena_dist.model.loss import perplexity
from hyena_dist.parallel.groups import Groups
from hyena_dist.runtime.requeue import clear_requeue, write_requeue
from hyena_dist.train.banner import last_line
from hyena_dist.train.report import write_report
from hyena_dist.train.run_directory import RunDirectory
from hyena_dist.train.state import RunState
from hyena_dist.train.status import finite

logger = logging.getLogger(__name__)


def note_stop(run: RunDirectory, reason: str, step: int) -> None:
    """Leave the marker of a run that was stopped after a step, of which there is a checkpoint.

    Raises:
        OSError: it could not be written.
    """
    write_requeue(run.path, reason, step)
    logger.info("stopped by %s after step %d, which is saved: the same command goes on", reason, step)


def note_end(run: RunDirectory, state: RunState, groups: Groups, steady_rate: float | None) -> None:
    """Leave summary.json and report.png of a run that had its last step, and say where they lie.

    Args:
        steady_rate: tokens per second of its latest steps; None: not known.

    Raises:
        OSError: the summary could not be written.
    """
    status = state.status
    final, best, what = status.val_loss, status.best_val_loss, "loss"
    if state.objective.has_perplexity:
        final, best, what = perplexity(final), perplexity(best), "perplexity"
    losses = {f"final_val_{what}": finite(final), f"best_val_{what}": finite(best)}
    run.write_summary(groups, **losses, steps=status.step,
                      tokens=state.objective.tokens(status.step), seconds=round(status.seconds, 3),
                      parameters=sum(shape.numel() for shape in state.engine.parameter_shapes.values()))
    clear_requeue(run.path)
    logger.info(last_line(run.path, steps=status.step, seconds=status.seconds, rate=steady_rate, final=final, best=best,
                          what=what, report=report_of(run.path, state.objective.scored_name)))


def report_of(run_dir: Path, scored_name: str) -> Path | None:
    """Draw the report of a run whose weights are saved: where it cannot be drawn, that is logged, and the run has not
    failed for it. None: there is no report."""
    try:
        return write_report(run_dir, scored_name)
    except OSError as error:
        logger.error("%s; the run is whole, and has no report", error)
        return None
