"""A rank's part of a batch, sums over the ranks that share one, and the validation loss."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch, validation_batches
from hyena_dist.data.tokenizer import IGNORE, PAD, split_window
from hyena_dist.model.loss import token_loss
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import slice_tokens

Take = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]


def slicer(groups: Groups, device: torch.device, *, token_multiple: int) -> Take:
    """What makes (input_ids [B, l], targets [B, l], windows [B]) of a batch, int64 on this rank's device: the slice of
    this context rank."""
    def on_device(tensor: Tensor) -> Tensor:
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy would wait for all work of the device
        return tensor.to(device, non_blocking=True)

    def take(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        input_ids, targets = split_window(on_device(batch.ids))
        return (slice_tokens(input_ids, groups.context, multiple=token_multiple, fill=PAD),
                slice_tokens(targets, groups.context, multiple=token_multiple, fill=IGNORE),
                on_device(batch.windows))
    return take


def has_scored(batch: Batch) -> bool:
    """Whether a window of the batch has a base to score; known without the device."""
    return bool((split_window(batch.ids)[1] != IGNORE).any())


def sum_over_data(tensor: Tensor, groups: Groups) -> Tensor:
    """The sum over data and context ranks, in place."""
    if groups.data_context.size > 1:
        dist.all_reduce(tensor, group=groups.data_context.group)
    return tensor


@torch.no_grad()
def validation_loss(model: nn.Module, manifest: Manifest, take: Take, groups: Groups, device: torch.device, *,
                    seq_len: int, batch_size: int, stop: Callable[[], bool],
                    watched: Callable[[Iterable[Batch]], Iterable[Batch]]) -> tuple[float, int] | None:
    """Nats per scored base of the validation split, nan when it has none, and their number. Collective.

    Args:
        watched: what the batches go through.
        stop: asked after every batch, the same answer on every rank; after True it is given up, and the result None.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for batch in watched(validation_batches(manifest, seq_len=seq_len, batch_size=batch_size, dp_rank=groups.data.rank,
                                            dp_size=groups.data.size)):
        input_ids, targets, _ = take(batch)
        loss, count = token_loss(model(input_ids), targets, groups.tensor)
        sums += torch.stack([loss.double(), count.double()])
        if stop():
            return None
    total, count = sum_over_data(sums, groups).tolist()
    return (total / count if count else float("nan")), int(count)
