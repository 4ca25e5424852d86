"""The training windows of a run, stage by stage of its length warm-up."""

from collections.abc import Callable, Generator
from itertools import islice
from typing import Any

from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import Stage, stage_at, stages
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.order import WindowOrder
from hyena_dist.data.stream import Batch, Part, StreamState, TrainStream


class Curriculum:
    """The windows of one data rank, an optimizer step at a time, each at the length of its stage.

    Every stage has its own order of windows, which starts with it. Worker processes serve one stage and end with it;
    `close` ends them before that.

    Args:
        config: already checked (`config.checks`).
        part_of: what this rank reads of windows of a length; None: all.
    """

    def __init__(self, manifest: Manifest, config: Config, *, dp_rank: int = 0, dp_size: int = 1,
                 part_of: Callable[[int], Part] | None = None) -> None:
        self.manifest, self.config, self.dp_rank, self.dp_size = manifest, config, dp_rank, dp_size
        self._part_of = part_of or (lambda seq_len: Part(0, seq_len))
        self.stages = stages(config, data_ranks=dp_size)
        self._batches: Generator[Batch] | None = None
        self._orders: dict[int, WindowOrder] = {}
        self.passed = 0
        """Optimizer steps whose windows no step has: each stage begins this many further on."""
        self._position: StreamState
        self._go_to(0)

    def take(self) -> tuple[Stage, list[Batch]]:
        """The next optimizer step: its stage, and this rank's micro-batches of it."""
        stage = self.stage
        if self._batches is None:
            self._batches = self._stream.batches(
                self._position, micro_batch_size=stage.micro_batch_size, global_batch_size=stage.global_batch_size,
                dp_rank=self.dp_rank, dp_size=self.dp_size, num_workers=self.config.data.num_workers,
                part=self._part_of(stage.seq_len))
        count = stage.global_batch_size // (stage.micro_batch_size * self.dp_size)
        batches = list(islice(self._batches, count))
        self.step += 1
        self._position = self._stream.advance(self._position, stage.global_batch_size)
        if stage_at(self.stages, self.step) is not stage:
            self._go_to(self.step)
        return stage, batches

    def epochs_after(self, step: int) -> float:
        """How often the first `step` optimizer steps have seen the training bases: epochs of each stage's own order of
        windows, added up."""
        epochs = 0.0
        for stage in self.stages:
            windows = max(min(step, stage.stop_step) - stage.first_step, 0) * stage.global_batch_size
            if windows:
                order = self._order_of(stage)
                epoch, index = order.advance(0, 0, windows)
                epochs += epoch + index / order.epoch_size(epoch)
        return epochs

    def _order_of(self, stage: Stage) -> WindowOrder:
        if stage.index not in self._orders:
            lengths = [interval.bases for interval in self._stream.intervals]
            self._orders[stage.index] = WindowOrder(lengths, stage.seq_len, seed=self.config.data.seed,
                                                    stage=stage.index)
        return self._orders[stage.index]

    def skip(self, *, steps: int) -> None:
        """Pass over the windows of this many optimizer steps; the steps themselves are not counted. The stages to come
        pass over as many of theirs, so that windows from beyond the end of this stage do not come back either."""
        self.passed += steps
        self._go_to(self.step)

    def close(self) -> None:
        """End the worker processes; the next `take` starts new ones, and goes on where this one was."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Which windows come next, for a checkpoint. After the last step of a stage these are the first of the next."""
        return {"step": self.step, "passed": self.passed, **self._stream.state_dict(self._position)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the number of data ranks, micro-batches and workers may be another.

        Raises:
            DataError: it was saved over other data, with another seed, or with stages of other lengths or batches.
        """
        if type(saved.get("step")) is not int or type(saved.get("passed")) is not int:
            raise DataError("cannot resume the data stream: the saved state has no step or passed; start afresh")
        self.passed = saved["passed"]
        self._go_to(saved["step"])
        if self._stream.load_state_dict(saved) != self._position:
            raise DataError(f"cannot resume the data stream: the saved position is not that of step {self.step} of "
                            "this run's stages and batches; resume with those of the saved run, or start afresh")

    def _go_to(self, step: int) -> None:
        """The first window of a step: as many steps on in its stage's order as the stage has had, and passed over."""
        self.close()
        self.step, self.stage = step, stage_at(self.stages, step)
        data, stage = self.config.data, self.stage
        self._stream = TrainStream(self.manifest, seq_len=stage.seq_len, seed=data.seed, rc_augment=data.rc_augment,
                                   stage=stage.index)
        steps = step - stage.first_step + self.passed
        self._position = self._stream.advance(self._stream.start(), steps * stage.global_batch_size)
