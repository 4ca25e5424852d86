"""A trace of a few training steps: where the time goes, by operator, and a timeline for chrome://tracing."""

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hyena_dist.runtime.files import write_whole, writing

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2
"""Not traced: they make caches and plans, and the second one starts the tracer."""
TABLE_ROWS = 40


class StepProfiler:
    """Traces `steps` training steps of this rank, after the first two of the process.

        with StepProfiler(run_dir, config.train.profile_steps, rank) as profiler:
            for ...:
                train_step()
                profiler.step()

    Then writes run_dir/profile/rank-N.json, a chrome trace, and rank-N.txt, the operators by their own time with its
    share. Costs nothing with 0 steps and once the trace is written.
    """

    def __init__(self, run_dir: Path, steps: int, rank: int) -> None:
        self._stem = run_dir / "profile" / f"rank-{rank}"
        self._profiler: profile | None = None
        self._left = 0
        if steps:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._left = WARMUP_STEPS + steps
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda], on_trace_ready=self._write,
                                     schedule=schedule(wait=WARMUP_STEPS - 1, warmup=1, active=steps, repeat=1))

    def __enter__(self) -> "StepProfiler":
        if self._profiler is not None:
            self._profiler.start()
        return self

    def step(self) -> None:
        """Tell it that a training step ended.

        Raises:
            OSError: the trace could not be written.
        """
        if self._profiler is None:
            return
        self._profiler.step()
        self._left -= 1
        if not self._left:
            self._stop()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._profiler is None:
            return
        logger.warning("train.profile_steps: the run ended %d steps before the trace was complete", self._left)
        self._stop()  # writes the steps that it has

    def _stop(self) -> None:
        stopping, self._profiler = self._profiler, None
        if stopping is not None:
            stopping.stop()

    def _write(self, profiler: profile) -> None:
        table, trace = (self._stem.with_suffix(suffix) for suffix in (".txt", ".json"))
        where = "self_cuda_time_total" if ProfilerActivity.CUDA in profiler.activities else "self_cpu_time_total"
        rows = profiler.key_averages().table(sort_by=where, row_limit=TABLE_ROWS, max_name_column_width=60)
        with writing(self._stem.parent):
            self._stem.parent.mkdir(parents=True, exist_ok=True)
        write_whole(table, lambda path: path.write_text(rows, encoding="utf-8"))
        write_whole(trace, lambda path: profiler.export_chrome_trace(str(path)))
        logger.info("train.profile_steps: wrote %s and %s", table, trace)
