"""A whole training step: forward, loss, backward, clipping, AdamW; ours, the frozen baseline from the same weights, and
a Transformer of the same size, which is our model with attention in place of Hyena."""

import copy
from collections import deque

import torch
from torch import Tensor, nn

from benchmarks.baseline import BaselineHyenaDNA, plain_training_loop
from benchmarks.compare import BASELINE, OURS, TOLERANCE, VALUE, YARDSTICK_TOLERANCE, Case, Measured, Results, Side
from benchmarks.models import Models, Size, autocast, published
from benchmarks.operators import DTYPES
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.costs.flops import TRAINING_PASSES, flops, parts, training_bytes
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.kinds import lacking
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.train.optimizer import build_optimizer

TRANSFORMER = "transformer"
ATTENTION_FLOPS = {"cpu": 1.5e11, "cuda": 5e15}
"""Of the attention in a step, by kind of device: beyond it, some 5 to 10 seconds, the Transformer is skipped."""


def step(size: Size, device: torch.device, precision: str) -> Case:
    """Whole steps on the same token ids [B, L + 1]; float64 is held against the logits and clipped gradients of the
    first. A Transformer has values of its own, and is held against itself in float64."""
    models = Models.build(size, device)
    exact = plain_step(models.exact, device, "fp32")
    hyena, attention = size.section(), size.section("A")
    sides = {OURS: Measured(our_step(models.ours, device, precision), exact, TOLERANCE[precision],
                            moved_bytes(hyena, size, precision)),
             BASELINE: Measured(plain_step(models.baseline, device, precision), exact, YARDSTICK_TOLERANCE[precision],
                                moved_bytes(hyena, size, precision))}
    skipped = {}
    work = TRAINING_PASSES * flops(attention, size.length, size.batch)["attention"]
    if work > ATTENTION_FLOPS[device.type]:
        skipped[TRANSFORMER] = f"skipped: {work:.0e} operations of attention would take too long here"
    else:
        transformer = new_model(attention, device)
        sides[TRANSFORMER] = Measured(our_step(transformer, device, precision),
                                      our_step(copy.deepcopy(transformer).double(), device, "fp32"),
                                      YARDSTICK_TOLERANCE[precision], moved_bytes(attention, size, precision))
    return Case(size.length, size.batch, lambda turn: token_ids(size, device, turn), sides, skipped)


def token_ids(size: Size, device: torch.device, turn: int) -> Tensor:
    """Random bases, int64 [B, L + 1]."""
    shape = (size.batch, size.length + 1)
    return torch.randint(7, 11, shape, generator=torch.Generator(device).manual_seed(turn), device=device)


def new_model(section: ModelSection, device: torch.device, activation_checkpointing: str = "none",
              backend: str = "auto") -> HyenaModel:
    """A model of a section with its initial values."""
    config = hyena_config(section, activation_checkpointing=activation_checkpointing, backend=backend)
    model = HyenaModel(config)
    initialize(model, model.placement(), model.tensor, seed=0)
    return model.train().to(device)


def moved_bytes(section: ModelSection, size: Size, precision: str) -> float:
    """What a step must move through memory at least, without the optimizer's part."""
    return sum(training_bytes(part, DTYPES[precision].itemsize)
               for part in parts(section, size.length, size.batch).values())


def our_step(model: HyenaModel, device: torch.device, precision: str) -> Side:
    """A step of our model on ids [B, L + 1]."""
    optim = OptimSection()
    optimizer = build_optimizer(model, model.placement(), optim)

    def run(ids: Tensor) -> Results:
        optimizer.zero_grad()
        with autocast(device, precision):
            logits = model(ids[:, :-1])
        total, count = token_loss(logits, ids[:, 1:])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        logits = logits.detach()
        return lambda: {VALUE: logits, **_gradients(model)}

    return run


def _gradients(model: HyenaModel) -> dict[str, Tensor]:
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    if lacking(model.config.layer_kinds, "published"):
        return grads  # has no published names, and is compared with another of ours
    return published(model, grads)


def plain_step(model: BaselineHyenaDNA, device: torch.device, precision: str) -> Side:
    """A step of the baseline in its own loop."""
    optim = OptimSection()
    waiting: deque[list[tuple[Tensor, Tensor]]] = deque()
    logits: dict[str, Tensor] = {}
    model.register_forward_hook(lambda _module, _given, found: logits.update({VALUE: found.detach()}))
    losses = plain_training_loop(_Autocast(model, device, precision), iter(waiting.popleft, None),
                                 lr_at=lambda _: optim.lr, betas=optim.betas, eps=optim.eps,
                                 weight_decay=optim.weight_decay, grad_clip=optim.grad_clip)

    def run(ids: Tensor) -> Results:
        waiting.append([(ids[:, :-1], ids[:, 1:])])
        next(losses)
        return lambda: logits | {name: weight.grad for name, weight in model.named_parameters()}

    return run


class _Autocast(nn.Module):
    """A model under autocast: the loop is plain."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, input_ids: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(input_ids)
