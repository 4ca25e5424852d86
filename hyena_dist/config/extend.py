"""A model of a longer context from the same weights: what becomes of the implicit filter."""

from dataclasses import replace
from typing import Literal

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection


def extended(section: ModelSection, max_seq_len: int, *, filter: Literal["keep", "stretch"]) -> ModelSection:
    """The `model` section of the same weights at a longer `max_seq_len`.

    `filter` says what happens to the long filters, which are curves over the lags, old length S = filter_seq_len:

    keep: positions stay normalised by S. Every lag keeps its value, so that inputs up to the old max_seq_len give the
        same logits bit for bit; the curve goes on past S, where no training has seen it (t > 1).
    stretch: positions are normalised by the new length S' = max_seq_len: the curve is drawn out over it, and lag
        (S' / S) n takes the value that lag n had. Phases there are the same exactly; t, on a grid of S' - 1 steps, is
        less by (S' - S) / (S (S' - 1)) of itself, which is below 1 / S. Every input changes its logits, and a filter
        sums over S' / S times as many lags.

    Raises:
        ConfigError: `max_seq_len` is not longer, or `filter` is another word.
    """
    if filter not in ("keep", "stretch"):
        raise ConfigError(f"filter must be keep or stretch, got {filter!r}")
    if max_seq_len <= section.max_seq_len:
        raise ConfigError(f"a context of {max_seq_len} is no extension of model.max_seq_len ({section.max_seq_len}): "
                          "give a longer one")
    if filter == "stretch":
        return replace(section, max_seq_len=max_seq_len, filter_seq_len=max_seq_len)
    return replace(section, max_seq_len=max_seq_len, filter_seq_len=section.filter_seq_len or section.max_seq_len)
