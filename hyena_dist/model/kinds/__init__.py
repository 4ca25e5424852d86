"""The kinds of mixers: all that the rest of the package asks about one is in its entry, a `MixerKind`.

`config.mixers` has their letters. An entry imports what its module and its formulas need where it needs it, because it
is also asked by commands that only check a configuration, and torch and megatron-core take seconds.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from hyena_dist.config import checks
from hyena_dist.config.advice import Problem, refuse
from hyena_dist.config.checks import Use
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.mixers import MIXERS, mixer_name
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.kinds.formulas import WHOLE, Part, Shape, Split

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch import Tensor, nn

    from hyena_dist.model.config import HyenaConfig
    from hyena_dist.model.layers import Norm
    from hyena_dist.model.placement import Weights
    from hyena_dist.ops.segments import Segments


class Mixer(Protocol):
    """The call of a mixer, as a block calls it, and Megatron a `self_attention`."""

    def __call__(self, hidden_states: "Tensor", attention_mask: "Tensor | None" = None, *, norm: "Norm | None" = None,
                 residual: bool = False, segments: "Segments | None" = None,
                 **attention_arguments: Any) -> "tuple[Tensor, None]":
        """[l, B, D], under sequence parallelism [l / T, B, D] -> (the same shape, no bias left to add).

        Args:
            norm: the norm before the mixer, where it is not applied yet.
            residual: add hidden_states, not normalised.
            segments: sequences in the rows that are mixed apart; a kind that does not know them refuses what is not
                None, as anything that it would ignore.
            attention_arguments: what Megatron may pass; a mixer refuses what it would ignore.
        """
        ...


class MixerModule(Protocol):
    """Builds this rank's share of a mixer, an `nn.Module` with the call of `Mixer`."""

    def __call__(self, config: "HyenaConfig", layer_number: int, *,
                 pg_collection: "ProcessGroupCollection | None" = None, seed: int | None = 0) -> "nn.Module":
        """
        Args:
            layer_number: of the layer, from 1.
            seed: of the initial values, those of a whole model's mixer in this layer; None leaves them to a model
                around it.
        """
        ...


class MixerMemory(Protocol):
    """What a mixer keeps of B sequences that are read a token at a time (`model.decode`)."""

    def __init__(self, mixer: "nn.Module", norm: "Norm", rows: "Tensor", room: int) -> None:
        """
        Args:
            mixer: whole on this rank, in eval mode.
            norm: the one before the mixer.
            rows: int64 [B], which of the prompts each sequence goes on from.
            room: how many tokens may follow a prompt.
        """
        ...

    def read(self, prompts: "list[Tensor]") -> "list[Tensor]":
        """Read the prompts, once before all steps: [P, 1, D] of each, of any length P >= 1, before the norm -> the
        mixer's output there, without its input."""
        ...

    def step(self, x: "Tensor") -> "Tensor":
        """The same of the next token of every sequence, [1, B, D] -> [1, B, D]."""
        ...


class Repeated(NamedTuple):
    """Operations of a mixer that its backward pass repeats."""

    always: float
    """Whatever train.activation_checkpointing is."""
    inner: float
    """Where that recomputes the inner tensors of a block."""


class Working(NamedTuple):
    """Bytes of a mixer in training."""

    saved: float
    """What its forward pass keeps for its backward pass, its input included."""
    working: float
    """What its backward pass holds beside that where it holds most."""
    exchanged: float = 0.0
    """Of `working`, what lies in buffers of exchanges between the context ranks."""
    plans: float = 0.0
    """Beside `working`, what cuFFT works in on a GPU."""


class MixerKind:
    """One kind of mixer; the base of every entry.

    Legend of its formulas: B (`batch`) sequences of L (`seq_len`) tokens, D channels, E (`itemsize`) bytes of an
    element of a product. They are of one mixer, with weights and inputs whole where nothing else is said.
    """

    exports: ClassVar[frozenset[str]] = frozenset()
    """The layouts of others that have such a mixer: published, huggingface (`config.formats`), or megatron, for
    Megatron's own GPTModel. Those of this package take every kind."""

    knows_segments: ClassVar[bool] = False
    """Whether it keeps several sequences in a row apart (`Mixer`: segments)."""

    def module(self) -> MixerModule:
        """The class of its module."""
        raise NotImplementedError

    def memory_of_tokens(self) -> type[MixerMemory] | None:
        """How it is read a token at a time; None: it cannot."""
        return None

    def weights(self, config: "HyenaConfig") -> "Weights":
        """Its weights by their names in the module: how each is split, decayed, saved and filled."""
        raise NotImplementedError

    def refuses(self, use: Use) -> Iterable[Problem]:  # noqa: ARG002 - nothing, if an entry does not say otherwise
        """What it cannot do: each violation names key, value and remedy."""
        return ()

    def shapes(self, section: ModelSection, tensor: int) -> list[Shape]:
        """Of its weights on one of this many tensor ranks."""
        raise NotImplementedError

    def parts(self, section: ModelSection, seq_len: int, batch: int) -> dict[str, Part]:
        """Its parts in a forward pass, by name. A name that several kinds have is one part of the model."""
        raise NotImplementedError

    def repeated(self, section: ModelSection, seq_len: int, batch: int) -> Repeated:  # noqa: ARG002 - as above
        """What its backward pass computes again."""
        return Repeated(0.0, 0.0)

    def memory(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, wide: bool,
               device: "torch.device", split: Split = WHOLE, backend: str = "auto") -> Working:
        """What it needs in training, on one rank.

        Args:
            seq_len: of whole sequences, whatever the split.
            wide: inner tensors, several times as wide as the input, are kept (train.activation_checkpointing is none
                or block).
            device: whose chunks it works through.
            backend: a value of `ops.backend`.
        """
        raise NotImplementedError

    def exchanged(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int, split: Split,
                  rank: int | None) -> dict[str, tuple[int, int]]:
        """Bytes that a rank sends to the other context ranks in a forward and in a backward pass, by collective.

        Args:
            seq_len: of whole sequences, padded to what the ranks divide.
            rank: its place among the context ranks; None: that which sends the most.
        """
        raise NotImplementedError

    def shared(self, section: ModelSection) -> list[int]:  # noqa: ARG002 - none, if an entry does not say otherwise
        """Elements of each weight that every tensor rank holds whole and uses for its own channels: its gradient is
        summed over them."""
        return []

    def moved(self, section: ModelSection, seq_len: int, batch: int, *, itemsize: int) -> dict[str, float]:
        """The fewest bytes that a training step moves for it, by part. The norm before it and the residual stream,
        which every mixer's last product reads and writes, are not in it."""
        raise NotImplementedError


def mixer_kind(letter: str) -> MixerKind:
    """The entry of a letter of `model.layer_pattern`."""
    return importlib.import_module(MIXERS[letter]).KIND


def lacking(letters: Iterable[str], layout: str) -> list[str]:
    """The names of the kinds, of these letters, that a layout of `MixerKind.exports` does not have."""
    return [mixer_name(letter) for letter in dict.fromkeys(letters) if layout not in mixer_kind(letter).exports]


def letter_of(module: "nn.Module") -> str | None:
    """The letter of the mixer that a module is, or that is the first in it; None: there is none."""
    for part in module.modules():
        for letter in MIXERS:
            if isinstance(part, cast("type", mixer_kind(letter).module())):
                return letter
    return None


def kinds_of(section: ModelSection) -> dict[str, int]:
    """How many layers of each kind a model has, by letter, in the order in which they first come."""
    letters = section.layer_kinds
    return {letter: letters.count(letter) for letter in dict.fromkeys(letters)}


def check(config: Config, *, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks: `config.checks`, with the rules of its mixers.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    checks.check(config, world_size=world_size, mixers=[_refusals])


def is_legal(config: Config, *, world_size: int) -> bool:
    """Whether `check` would pass, without finding advice."""
    return not checks.problems([_refusals], config, world_size)


def check_mixers(config: Config) -> None:
    """Refuse a model that its mixers cannot be, whatever is done with it.

    Raises:
        ConfigError: one line per violation, each naming key, value and remedy.
    """
    refuse(lambda config, _: list(_refusals(Use(config.model, config.parallel))), config, 0)


def refuse_context(model: ModelSection, ranks: int) -> None:
    """Refuse context ranks over which the mixers of a model cannot be split.

    Raises:
        ConfigError: names the key and its value.
    """
    problems = _refusals(Use(model, ParallelSection(context=ranks)))
    if lines := [problem if isinstance(problem, str) else problem.text for problem in problems]:
        raise ConfigError(f"{'; '.join(lines)}: split a sequence over another number of ranks")


def _refusals(use: Use) -> Iterable[Problem]:
    for letter in kinds_of(use.model):
        kind = mixer_kind(letter)
        if use.packed and not kind.knows_segments:
            yield (f"data.pack: {mixer_name(letter)} layers ({letter} of model.layer_pattern) do not keep the contigs "
                   "of a packed window apart: set data.pack=false, or take other layers")
        yield from kind.refuses(use)
