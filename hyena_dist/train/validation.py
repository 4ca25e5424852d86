"""A rank's part of a batch, sums over the ranks that share one, and the validation loss."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.config.schema import Config
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import Batch, ValidationBatches
from hyena_dist.data.tokenizer import IGNORE, PAD, split_window
from hyena_dist.model.loss import token_loss
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.progress import Countable


class Measured(NamedTuple):
    """A validation."""

    loss: float
    """Nats per scored base; nan where there is none."""
    scored: int
    """Bases that it is the mean of."""


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


class Validation:
    """The validation loss of a run, measured as often as it is asked for, on the same windows.

    Args:
        config: `data.val_seq_len` and `data.val_tokens` say which windows.
    """

    def __init__(self, config: Config, manifest: Manifest, take: Take, groups: Groups, device: torch.device) -> None:
        self.seq_len = config.data.val_seq_len or config.data.seq_len
        self.batches = ValidationBatches(manifest, seq_len=self.seq_len, batch_size=config.train.micro_batch_size,
                                         dp_rank=groups.data.rank, dp_size=groups.data.size,
                                         tokens=config.data.val_tokens)
        self._take, self._groups, self._device = take, groups, device

    @torch.no_grad()
    def measure(self, model: nn.Module, *, stop: Callable[[], bool],
                watched: Callable[[Countable[Batch]], Iterable[Batch]], most: int | None = None) -> Measured | None:
        """Run the model over the windows. Collective. The device is waited for once, at the end.

        Args:
            watched: what the batches go through.
            stop: asked after every batch, the same answer on every rank; after True it is given up, and the result
                None.
            most: batches, of the first ones; None: all.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        model.eval()
        for batch in watched(self.batches if most is None else list(islice(self.batches, most))):
            input_ids, targets, _ = self._take(batch)
            loss, count = token_loss(model(input_ids), targets, self._groups.tensor)
            sums += torch.stack([loss.double(), count.double()])
            if stop():
                return None
        total, count = sum_over_data(sums, self._groups).tolist()
        return Measured(total / count if count else float("nan"), int(count))
