"""The token embedding, whose gradient sums all tokens of a batch into a vocabulary of a dozen rows, or with k-mers of
thousands."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_ROWS = 64
"""Of a vocabulary whose gradient is summed by a product on a GPU: its time and its memory grow with the rows."""


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """int64 ids [...] and weight [V, D] -> [..., D]."""
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows, flat = ids.flatten(), dy.flatten(0, -2)
        # A GPU's own kernel sorts the tokens, and takes four times as long as the product with 16 rows.
        by_product = dy.device.type != "cpu" and ctx.rows <= MOST_ROWS
        return None, (sums if by_product else sums_reference)(rows, flat, ctx.rows)


def sums(ids: Tensor, x: Tensor, count: int) -> Tensor:
    """Of x [n, D] over the tokens of each id below `count`: [count, D], as a product, the same bits each time."""
    chosen = ids == _every_id(count, ids.device)
    return chosen.to(x.dtype).mm(x)


@lru_cache
@torch.inference_mode(False)  # what is kept may be saved for a backward pass later
def _every_id(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)[:, None]


def sums_reference(ids: Tensor, x: Tensor, count: int) -> Tensor:
    """The same by torch."""
    return torch.ops.aten.embedding_dense_backward(x, ids, count, -1, False)
