"""Which kinds of mixers there are, by the letter of `model.layer_pattern`.

Only their names are known here, so that a configuration is read without torch. What a kind is, is described in the
module that this table names, by its `KIND` (`model.kinds.MixerKind`).
"""

MIXERS = {
    "H": "hyena_dist.model.kinds.hyena",
    "A": "hyena_dist.model.kinds.attention",
}
"""Letter -> the module that describes the kind. A new kind is a module of its own, and a line here."""

ALL_HYENA = "H"
"""What an empty `model.layer_pattern` means."""


def mixer_name(letter: str) -> str:
    """The name of a kind in messages: that of its module."""
    return MIXERS[letter].rpartition(".")[2]


def layer_letters(pattern: str, num_layers: int) -> str:
    """The letter of every layer: the pattern, repeated to that many layers."""
    return ((pattern or ALL_HYENA) * num_layers)[:num_layers]


def check_letters(pattern: str) -> None:
    """Raises ValueError: a letter of `model.layer_pattern` is of no kind; names those that there are."""
    if set(pattern) - set(MIXERS):
        kinds = [f"{letter} ({mixer_name(letter)})" for letter in MIXERS]
        raise ValueError(f"model.layer_pattern may hold only {', '.join(kinds[:-1])} and {kinds[-1]}, got {pattern!r}")
