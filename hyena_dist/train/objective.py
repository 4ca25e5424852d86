"""What a run learns, as the trainer sees it: `Objective`. Pretraining is the first (`train/pretraining.py`).

The trainer owns engines, steps, saving, stopping and logging, and knows nothing of tokens, heads or labels. An
objective owns the module, the batches, the loss and the validation, and knows nothing of engines or files.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from hyena_dist.costs.utilisation import Utilisation
from hyena_dist.engine.protocol import Table
from hyena_dist.train.progress import Countable

T = TypeVar("T")
Watched = Callable[[Countable[T]], Iterator[T]]
"""What an objective's validation takes its batches through: the trainer shows how far it is, tells the watchdog that
they come, and ends the validation by an exception of its own when all ranks stop. It may pass on the first ones only,
to see that they fit. Every rank takes the same number of them."""


class MicroBatch(Protocol):
    """One micro-batch of this rank, in the host's memory."""

    @property
    def scored(self) -> float:
        """Of how many positions (tokens, labels) its loss is the sum, on this rank alone; where they have weights, the
        sum of those. The loss of a step is the sum of all losses divided by the sum of these."""


B = TypeVar("B", bound=MicroBatch)


@dataclass(frozen=True)
class Step(Generic[B]):
    """One optimizer step, as far as it is this rank's."""

    batches: Sequence[B]
    """Its micro-batches; as many on every rank."""
    stage: int
    """Steps of one stage have the same shapes."""
    seq_len: int
    micro_batch_size: int
    tokens: int
    """Of all ranks, padding included: what tokens per second count."""
    new_shape: bool = False
    """Whether the next step has other shapes, so that it takes longer."""

    @property
    def scored(self) -> float:
        return sum(batch.scored for batch in self.batches)


@dataclass(frozen=True)
class Scores:
    """What a validation found; the same on every rank."""

    loss: float
    """Mean over what was scored, by which the best checkpoint is chosen; nan: there was nothing."""
    scored: float
    """As that of a micro-batch, over everything that was validated."""
    seq_len: int
    extras: Mapping[str, float] = field(default_factory=dict)
    """Other metrics, for the rows of the validation: those that the objective declares, and no others."""


class Objective(Protocol[B]):
    """What a run learns. Every method is called on all ranks, in the same order."""

    name: str
    """Written into checkpoints: a run goes on from those of an objective of the same name only."""
    extras: Collection[str]
    """Names of the metrics that its validations find besides the loss. One that is a line of `metrics.METRICS` is drawn
    as that says, any other plainly."""
    has_perplexity: bool
    """Whether its loss is in nats per base, so that its exponential is a perplexity; the loss of a label is not."""
    scored_name: str
    """What it scores, in the plural, as `bases` or `sequences`."""
    no_batch: str
    """Why a batch may not come, and what to do; said after "a batch did not come for N s: "."""
    nothing_to_train: str
    """What is said of a step whose batches have nothing to score, after "step N: "."""
    nothing_to_validate: str
    """What is said where a validation has no loss."""

    @property
    def module(self) -> nn.Module:
        """The model to train, on its device. Weights that do not require a gradient are frozen. The engine may wrap or
        shard it: what is called after that is the module that `loss` and `validate` get."""

    @property
    def table(self) -> Table:
        """The placement of every parameter of the module."""

    def utilisation(self) -> Utilisation | None:
        """How much of the devices its steps use; None: there is no formula for what they compute. Asked for once, when
        the engine has the module."""

    def next_step(self) -> Step[B]:
        """The next optimizer step's batches.

        Raises:
            DataError: they cannot be read.
        """

    def loss(self, module: nn.Module, batch: B, step: int) -> Tensor:
        """The loss summed over what the batch scores, 0-dim, with its graph. Must not wait for the device.

        Args:
            step: optimizer steps done; together with the batch it decides all that is drawn (dropout).
        """

    def validate(self, module: nn.Module, watched: Watched[B]) -> Scores | None:
        """Score the held-out data with a module in eval mode and without gradients; None: there is none."""

    def tokens(self, step: int) -> int:
        """Training tokens up to an optimizer step, over all ranks."""

    def epochs(self, step: int) -> float:
        """How often the training data was seen up to an optimizer step."""

    def skip(self, steps: int) -> None:
        """Pass over the batches of this many optimizer steps: those after the steps that are lost come next."""

    @property
    def skipped(self) -> int:
        """How many steps were passed over so far."""

    def state_dict(self) -> dict[str, Any]:
        """Which batches come next, and whatever else of the objective a checkpoint must bring back; JSON holds it.
        Collective."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, at any number of ranks.

        Raises:
            UserError: it was taken over other data or settings that decide the order, or something is missing.
        """

    def close(self) -> None:
        """End what reads ahead."""
