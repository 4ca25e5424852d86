"""A whole training step, ours against the frozen baseline, interleaved in one process on the same fresh inputs.

The step: forward, loss, backward, clipping, AdamW. Both start from the same weights, and a row is refused when the
first step's losses differ.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.baseline import BaselineHyenaDNA, plain_training_loop
from hyena_dist.config.schema import OptimSection
from hyena_dist.convert import from_published, to_published
from hyena_dist.model.loss import token_loss
from hyena_dist.train.optim import build_optimizer

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """Layers x channels at a length and a batch."""

    layers: int
    channels: int
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.channels} at {self.length} x {self.batch}"


SIZES = (Size(2, 128, 1024, 32), Size(2, 64, 131072, 1))


@dataclass(frozen=True)
class Row:
    """Medians over the repetitions."""

    size: str
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    """Median of baseline / ours, pair by pair: more than 1 is faster than the baseline."""
    tokens_per_second: float
    loss_difference: float


def run(sizes: tuple[Size, ...] = SIZES, *, repetitions: int = 5) -> list[Row]:
    """Time every size.

    Raises:
        ValueError: the losses of the two models differ: a time of wrong values is worth nothing.
    """
    return [_compare(size, repetitions) for size in sizes]


def _compare(size: Size, repetitions: int) -> Row:
    ours, baseline = _steps(size)
    generator = torch.Generator().manual_seed(0)
    pairs, differences = [], []
    for repetition in range(repetitions + 1):
        ids = torch.randint(7, 11, (size.batch, size.length + 1), generator=generator)
        order = (ours, baseline) if repetition % 2 else (baseline, ours)
        timed = {step: _timed(step, ids) for step in order}
        differences.append(abs(timed[ours][1] - timed[baseline][1]))
        if repetition:  # the first is the warm-up
            pairs.append((timed[ours][0], timed[baseline][0]))
    if max(differences) > LOSS_TOLERANCE:
        raise ValueError(f"{size}: the losses of the two models differ by {max(differences):.1e}")
    ours_seconds, baseline_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Row(str(size), ours_seconds, baseline_seconds, statistics.median(b / a for a, b in pairs),
               size.batch * size.length / ours_seconds, max(differences))


def _timed(step: Callable[[torch.Tensor], float], ids: torch.Tensor) -> tuple[float, float]:
    started = time.perf_counter()
    loss = step(ids)
    return time.perf_counter() - started, loss


def _steps(size: Size) -> tuple[Callable[[torch.Tensor], float], Callable[[torch.Tensor], float]]:
    """One training step of each model on ids [B, L + 1]; both return the loss before the update."""
    layer = {"l_max": size.length, "emb_dim": 5, "filter_order": 64, "short_filter_order": 3, "order": 2, "w": 10}
    config = {"d_model": size.channels, "n_layer": size.layers, "d_inner": 4 * size.channels, "vocab_size": 12,
              "embed_dropout": 0.0, "resid_dropout": 0.0, "pad_vocab_size_multiple": 8, "layer": layer}
    model = from_published(config, None).train()
    plain = BaselineHyenaDNA(config)
    plain.load_state_dict(to_published(model)[1])
    optim = OptimSection()
    optimizer = build_optimizer(model, model.placement(), optim)

    def ours(ids: torch.Tensor) -> float:
        total, count = token_loss(model(ids[:, :-1]), ids[:, 1:])
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    waiting: deque[list[tuple[torch.Tensor, torch.Tensor]]] = deque()
    losses = plain_training_loop(plain, iter(waiting.popleft, None), lr_at=lambda _: optim.lr, betas=optim.betas,
                                 eps=optim.eps, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip)

    def baseline(ids: torch.Tensor) -> float:
        waiting.append([(ids[:, :-1], ids[:, 1:])])
        return next(losses)

    return ours, baseline
