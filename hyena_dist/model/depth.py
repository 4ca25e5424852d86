"""Layer-wise learning rates: what lies deeper in a pretrained model knows more general things, and is changed less."""

import re
from collections.abc import Mapping
from dataclasses import replace

from hyena_dist.model.placement import Placement

_LAYER, _EMBEDDING = re.compile(r"(?:.*\.)?layers\.(\d+)\..*"), re.compile(r"(?:.*\.)?word_embeddings\.weight")


def scaled_by_depth(table: Mapping[str, Placement], num_layers: int, decay: float) -> dict[str, Placement]:
    """The same placements with learning rates times decay^depth. The depth of a head and of the final norm is 0, of the
    last layer 1, of the first `num_layers`, of the embedding one more."""
    return {name: replace(entry, lr_scale=entry.lr_scale * decay ** _depth(name, num_layers))
            for name, entry in table.items()}


def _depth(name: str, num_layers: int) -> int:
    if match := _LAYER.fullmatch(name):
        return num_layers - int(match[1])
    return num_layers + 1 if _EMBEDDING.fullmatch(name) else 0
