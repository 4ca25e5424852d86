"""The stages of a run's length warm-up (`train.seq_len_warmup`), as pure functions of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.train import WarmupStage

DOUBLE_FROM = 64
"""First length of `double` (HyenaDNA, Nguyen et al. 2023, section 3.2)."""


@dataclass(frozen=True)
class Stage:
    """A part of a run that trains at one length; optimizer steps are counted from 0 over the whole run."""

    index: int
    """Also the number of the stage's window order (`TrainStream`)."""
    first_step: int
    stop_step: int
    """One past its last step."""
    seq_len: int
    micro_batch_size: int
    """Windows per rank and forward pass. Topology: no number that a run computes depends on it, but by rounding."""
    global_batch_size: int
    """Windows per optimizer step, over all ranks."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, padding included."""
        return self.global_batch_size * self.seq_len


def stages(config: Config, *, data_ranks: int) -> tuple[Stage, ...]:
    """The stages of a run in their order; the last is at data.seq_len. Without a warm-up it is the only one.

    Whether they fit the configuration is for `config.checks` to say: a stage may come out longer than data.seq_len, or
    the last without a step.
    """
    train, found, first_step = config.train, [], 0
    for index, entry in enumerate(warmup_entries(config)):
        ratio = max(config.data.seq_len // entry.seq_len, 1)
        batch = train.global_batch_size * (ratio if train.seq_len_warmup_batch == "tokens" else 1)
        micro = entry.micro_batch_size or _widened(train.micro_batch_size, ratio, batch, data_ranks)
        steps = entry.steps or -(-(entry.tokens or 0) // (batch * entry.seq_len))
        found.append(Stage(index, first_step, first_step + steps, entry.seq_len, micro, batch))
        first_step += steps
    return (*found, Stage(len(found), first_step, train.steps, config.data.seq_len, train.micro_batch_size,
                          train.global_batch_size))


def warmup_entries(config: Config) -> list[WarmupStage]:
    """The stages before data.seq_len as the configuration gives them, `double` written out."""
    train = config.train
    if train.seq_len_warmup == "none":
        return []
    if train.seq_len_warmup == "double":
        doublings = range(((config.data.seq_len - 1) // DOUBLE_FROM).bit_length())
        return [WarmupStage(seq_len=DOUBLE_FROM << n, steps=train.seq_len_warmup_steps) for n in doublings]
    return [WarmupStage.read(f"train.seq_len_warmup[{index}]", entry)
            for index, entry in enumerate(train.seq_len_warmup)]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of optimizer step `step`, counted from 0; after the last step it is the last stage."""
    return next((stage for stage in stages if step < stage.stop_step), stages[-1])


def tokens_after(stages: Sequence[Stage], step: int) -> int:
    """Tokens of the first `step` optimizer steps, padding included."""
    return sum(max(min(step, stage.stop_step) - stage.first_step, 0) * stage.tokens_per_step for stage in stages)


def _widened(micro_batch_size: int, ratio: int, batch: int, data_ranks: int) -> int:
    """The largest multiple of the micro-batch, of at most `ratio` times, that divides a rank's part of the batch."""
    fits = (times for times in range(ratio, 0, -1) if batch % (micro_batch_size * times * data_ranks) == 0)
    return micro_batch_size * next(fits, 1)
