"""The language-model loss: a sum over scored tokens, to be divided by their global count."""

import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the scored targets, in nats, and their number.

    Args:
        logits: [B, L, V]; half precision is computed in float32.
        targets: int64 [B, L]; `ignore_index` is not scored.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (targets != ignore_index).sum()
