"""The training windows of a run, stage by stage of its length warm-up."""

from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import Stage, stage_at, stages
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.mixture import Change
from hyena_dist.data.pool import Pool, first_weights
from hyena_dist.data.rows import Part
from hyena_dist.data.stream import Batch, StreamState, TrainStream
from hyena_dist.data.tokenizer import tokenizer_of


class SourceUse(NamedTuple):
    """What a run has seen of a source of its mixture."""

    name: str
    share: float
    """Of all tokens."""
    epochs: float
    unique_bases: float
    """How many of its bases were seen. The orders of stages know nothing of each other: over several it is what is to
    be expected."""


class Curriculum:
    """The windows of one data rank, an optimizer step at a time, each at the length of its stage.

    Every stage has its own order of windows, which starts with it. Worker processes serve one stage and end with it;
    `close` ends them before that.

    Args:
        pools: what the windows are drawn from: the sources of config.data.mixture, in their order, or a manifest.
        config: already checked (`config.checks`).
        part_of: what this rank reads of windows of a length; None: all.
    """

    def __init__(self, pools: Manifest | Sequence[Pool], config: Config, *, dp_rank: int = 0, dp_size: int = 1,
                 part_of: Callable[[int], Part] | None = None) -> None:
        self.pools: list[Pool] = [Pool(pools)] if isinstance(pools, Manifest) else list(pools)
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self._weights = first_weights(config.data, self.pools)
        self._part_of = part_of or (lambda seq_len: Part(0, seq_len))
        self.stages = stages(config, data_ranks=dp_size)
        self._batches: Generator[Batch] | None = None
        self._streams: dict[int, TrainStream] = {}
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
        windows, added up. Of a mixture it is the mean over the bases of all sources."""
        if step <= 0:
            return 0.0
        bases = [pool.train_bases for pool in self.pools]
        uses = self.source_uses(step)
        return sum(use.epochs * size for use, size in zip(uses, bases, strict=True)) / sum(bases)

    def source_uses(self, step: int) -> list[SourceUse]:
        """What the first `step` optimizer steps, at least one, have seen of each source."""
        tokens, epochs, unseen = (np.full(len(self.pools), start) for start in (0.0, 0.0, 1.0))
        for stage in self.stages:
            windows = max(min(step, stage.stop_step) - stage.first_step, 0) * stage.global_batch_size
            if windows:
                stream = self._stream_of(stage)
                of_stage = np.array(stream.epochs(windows))
                tokens += np.array(stream.counts(windows)) * stage.seq_len
                epochs += of_stage
                unseen *= 1 - np.minimum(of_stage, 1)
        return [SourceUse(pool.name, float(tokens[i] / tokens.sum()), float(epochs[i]),
                          float((1 - unseen[i]) * pool.train_bases)) for i, pool in enumerate(self.pools)]

    def step_past(self, source: int, epochs: float, steps: int) -> int | None:
        """The first of so many optimizer steps after which the run has seen a source more often than that; None: there
        is none. It looks at few more epochs than these, however many there are to come."""
        def seen(step: int) -> float:
            return self.source_uses(step)[source].epochs

        last = 1
        while last < steps and seen(last) <= epochs:
            last = min(2 * last, steps)
        if seen(last) <= epochs:
            return None
        return bisect_right(range(last + 1), epochs, lo=1, key=seen)

    def packed(self) -> list[str]:
        """What shares windows in an epoch at the full length, a line for each source; nothing without data.pack."""
        if not self.config.data.pack:
            return []
        stage, lines = self.stages[-1], []
        for pool, order in zip(self.pools, self._stream_of(self.stages[-1]).orders, strict=True):
            pieces, windows, of_windows = order.shared(0)
            lines.append(f"data.pack: {f'source {pool.name}: ' if pool.name else ''}{pieces:,} contigs and ends of "
                         f"contigs are too short for a window of {stage.seq_len:,} and share {windows:,} of the "
                         f"{of_windows:,} windows of an epoch")
        return lines

    def sources_of(self, stage: Stage, windows: Sequence[int]) -> list[int]:
        """Which source each window of a stage is of, by their numbers."""
        return self._stream_of(stage).sources_of(windows)

    def _stream_of(self, stage: Stage) -> TrainStream:
        if stage.index not in self._streams:
            data = self.config.data
            self._streams[stage.index] = TrainStream(
                self.pools, seq_len=stage.seq_len, seed=data.seed, rc_augment=data.rc_augment, stage=stage.index,
                weights=self._weights_of(stage), lower_case_weight=data.lower_case_weight,
                tokenizer=tokenizer_of(self.config.model), pack=data.pack)
        return self._streams[stage.index]

    def _weights_of(self, stage: Stage) -> list[Change]:
        """The weights of the sources, and from which of the stage's windows on. Windows that were passed over count as
        any others, so that the source of a window depends on its number alone."""
        changes = [Change(0, tuple(self._weights))]
        for change in self.config.data.changes():
            window = max(change.step - stage.first_step, 0) * stage.global_batch_size
            weights = tuple(float(change.weights[pool.name]) for pool in self.pools)
            changes = [*(earlier for earlier in changes if earlier.window < window), Change(window, weights)]
        return changes

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
        self._stream = self._stream_of(self.stage)
        steps = step - self.stage.first_step + self.passed
        self._position = self._stream.advance(self._stream.start(), steps * self.stage.global_batch_size)
