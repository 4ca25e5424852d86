"""From a run directory to a trainer: the parts are made in the order in which they may refuse, and ended in reverse."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict

import psutil
import torch

from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.config.schema import Config
from hyena_dist.engine.frozen import frozen_weights
from hyena_dist.parallel.groups import Groups, give_back, gloo_copy
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.logs import RankLog, StepTimes
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.runtime.watchdog import Watchdog
from hyena_dist.train.build_engine import build_engine
from hyena_dist.train.ledger import Ledger
from hyena_dist.train.lost_steps import LostSteps
from hyena_dist.train.metrics import Metrics
from hyena_dist.train.objective import Objective
from hyena_dist.train.pretraining import Pretraining
from hyena_dist.train.profile import StepProfiler
from hyena_dist.train.run_directory import RunDirectory
from hyena_dist.train.state import RunState
from hyena_dist.train.trainer import Trainer


@contextmanager
def open_trainer(config: Config, groups: Groups, device: torch.device, *,
                 objective: Callable[[Config, Groups, torch.device], Objective] = Pretraining,
                 launchers: Sequence[psutil.Process] | None = None) -> Iterator[Trainer]:
    """A context with a trainer that is ready to `fit`, at the start or where its newest checkpoint left it. Collective;
    leaving it without an error waits for all ranks.

    Args:
        config: already checked (`config.checks`).
        groups: of the initialised process group.
        device: of this rank, already selected.
        objective: makes what is learnt.
        launchers: of this process (`launcher_processes`), found as early as can be; None: those of now.

    Raises:
        UserError: data, checkpoint or run directory do not fit the configuration; the same on every rank.
    """
    first = groups.world.rank == 0
    run = RunDirectory(config, first=first)
    control = gloo_copy(groups.world)
    with ExitStack() as last, ExitStack() as stack:
        stop = stack.enter_context(StopSignal(control, seconds=_seconds(config)))
        agree(run.claim, groups)
        stack.callback(run.release)
        run.check_shared(groups)
        agree(lambda: stack.enter_context(RankLog(run.path, groups.world.rank)), groups)
        # From here on: a peer may be lost while the run is set up as well.
        watchdog = stack.enter_context(Watchdog(control, stop, launchers=launchers))
        task = stack.enter_context(closing(objective(config, groups, device)))
        start = run.start_from(run.newest(groups), groups, objective=task.name, frozen=frozen_weights(task.module))
        engine = build_engine(config, task.module, task.table, groups)
        saver = stack.enter_context(closing(CheckpointSaver(
            run.checkpoints, groups, keep=config.train.keep_last, keep_every=config.train.keep_every,
            passed_over=run.passed_over, saved=run.note_saved)))
        saver.probe()
        state = RunState(config, groups, engine, task)
        if start is not None:
            state.restore(start)
        agree(lambda: run.begin(start), groups)  # not before all that could refuse
        if start is not None and not start.own:
            # A branch begins by saving what it begins with: from here on it needs its origin no more.
            saver.save(engine, task.table, state.status.step, state.metadata())
            saver.wait()
        times = StepTimes(control, together=_together(config, groups))
        metrics = agree(lambda: Metrics(run.path, last_step=state.status.step, total_steps=config.train.steps,
                                        now=time.time(), settings=asdict(config), wandb=config.train.wandb,
                                        extras=task.extras, anew=start is None or not start.own)
                        if first else None, groups)
        if metrics is not None:
            last.callback(metrics.close_wandb)  # it may wait for its network: no rank waits here any more
            stack.callback(metrics.close)
        lost = LostSteps(config.train.on_nonfinite)
        ledger = Ledger(device, metrics, times, lost, loss_scaler=engine.loss_scaler, objective=task,
                        last_checkpoint=lambda: trainer.last_checkpoint())
        profiler = stack.enter_context(StepProfiler(run.path, config.train.profile_steps, groups.world.rank))
        trainer = Trainer(config, groups, device, state, run=run, saver=saver, stop=stop, watchdog=watchdog,
                          ledger=ledger, lost=lost, profiler=profiler)
        yield trainer
    give_back(control)


def _seconds(config: Config) -> float | None:
    return None if config.train.max_hours is None else 3600 * config.train.max_hours


def _together(config: Config, groups: Groups) -> int:
    """How many ranks in a row wait for each other in a forward pass: those that share a sequence, or all where weights
    are gathered for it."""
    gathers = config.engine.name == "fsdp" or config.engine.zero_stage == 3
    return groups.world.size if gathers else groups.tensor.size * groups.context.size
