"""Several contigs in a row of tokens, with their borders as segments: logits, loss and every weight's gradient are
those of each contig in a row of its own, on one rank and over tensor, sequence and context ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from hyena_dist.checkpoint.format import split_parts
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops import chunked, long_conv, segments, short_conv
from hyena_dist.parallel.collectives import all_gather, all_reduce
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed

LENGTH = 64
ROWS = ((0, 5, 16, 17, 64), (0, 10, 32, 62, 64))
"""Of four context ranks, whose slices begin at 16, 32 and 48: borders inside a slice, at its edge and one token behind,
a segment over three slices, and one that is shorter than the short convolution."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    context: int = 1
    sequence: bool = False
    pattern: str = "H"
    recompute: str = "none"
    order: int = 2
    overlap: int = 1
    width: int = 16
    dtype: torch.dtype = torch.float64


CASES = [
    Case(), Case(recompute="block", order=3), Case(pattern="HA", recompute="full"), Case(dtype=torch.float32),
    Case(tensor=2, recompute="selective"), Case(tensor=2, sequence=True, pattern="AH"), Case(context=2, order=3),
    Case(context=2, recompute="full", overlap=2), Case(context=4, pattern="HA", recompute="block"),
    Case(context=4, width=6), Case(context=4, width=6, order=3, recompute="selective"),  # two ranks share a channel
    Case(tensor=2, context=2, sequence=True, pattern="HAH"), Case(context=4, dtype=torch.float32),
]


def build(case: Case, groups: Groups, parallel: ParallelSection | None) -> HyenaModel:
    section = ModelSection(num_layers=max(2, len(case.pattern)), hidden_size=case.width, max_seq_len=LENGTH,
                           filter_order=8, hyena_order=case.order, embed_dropout=0.0, num_attention_heads=4,
                           layer_pattern=case.pattern)
    config = hyena_config(section, activation_checkpointing=case.recompute, parallel=parallel, params_dtype=case.dtype)
    model = HyenaModel(config, groups.collection())
    initialize(model, model.placement(), model.tensor, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "conv" not in name:
                parameter.add_(0.01)
    return model


def windows() -> tuple[Tensor, Tensor]:
    """Inputs and targets [2, L]; the last base of a contig has no target."""
    ids = torch.randint(7, 11, (len(ROWS), LENGTH + 1), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    for row, edges in zip(targets, ROWS, strict=True):
        row[[edge - 1 for edge in edges[1:]]] = -100
    return ids[:, :-1], targets


def separate(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of the slow way: the contigs one at a time."""
    model = build(case, Groups.single(), None)
    ids, targets = windows()
    logits = [[model(ids[row, None, a:b]) for a, b in pairwise(edges)] for row, edges in enumerate(ROWS)]
    together = torch.cat([torch.cat(row, dim=1) for row in logits])
    loss, _ = token_loss(together, targets)
    loss.backward()
    return together.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def errors(case: Case, groups: Groups) -> dict[str, float]:
    """Of this rank, against `separate`."""
    logits, loss, gradients = separate(case)
    parallel = ParallelSection(tensor=case.tensor, context=case.context, sequence=case.sequence,
                               overlap_groups=case.overlap)
    model = build(case, groups, parallel)
    ids, targets = (slice_tokens(x, groups.context, multiple=model.token_multiple, fill=4) for x in windows())
    found = model(ids, segments=ROWS)
    total, _ = token_loss(found, targets, groups.tensor)
    total.backward()
    mine = logits.chunk(case.context, dim=1)[groups.context.rank].chunk(case.tensor, dim=2)[groups.tensor.rank]
    result = {"logits": rel(found, mine), "loss": rel(_summed(total, groups), loss)}
    table = model.placement()
    for name, parameter in model.named_parameters():
        parts = split_parts(_summed(parameter.grad, groups), table[name])
        if table[name].tp_dim is not None and case.tensor > 1:
            parts = {key: all_gather(part, groups.tensor, table[name].tp_dim) for key, part in parts.items()}
        result[name] = rel(torch.cat(list(parts.values())), gradients[name])
    return result


def _summed(x: Tensor, groups: Groups) -> Tensor:
    return all_reduce(x.detach(), groups.context) if groups.context.size > 1 else x


def _short_crosses() -> Iterator[None]:
    tape = short_conv.ShortConvTape.__init__
    with mock.patch.object(short_conv.ShortConvTape, "__init__", lambda self, *args: tape(self, *args[:4])):
        yield


def _long_crosses() -> Iterator[None]:
    def whole(method, length, _segments, *args):
        return long_conv._Whole(long_conv.transform(method, length, *args), length)
    lags = property(lambda _self: LENGTH, lambda _self, _value: None)
    with (mock.patch.object(long_conv, "convolution", whole), mock.patch.object(chunked, "convolution", whole),
          mock.patch.object(segments.Segments, "longest", lags, create=True)):
        yield


CONTROLS = {"the short convolution crosses": contextmanager(_short_crosses),
            "the long convolution crosses": contextmanager(_long_crosses)}


def _on_ranks(cases: list[Case]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Of each case the errors, and the largest one under each control."""
    made: dict[tuple[int, int], Groups] = {(1, 1): Groups.single()}
    found = []
    for case in cases:
        shape = case.tensor, case.context
        made[shape] = made.get(shape) or init_groups(tensor=case.tensor, context=case.context)
        with mock.patch.object(segments, "LEAST_SIZE", 2):  # so that there are several groups
            right, wrong = errors(case, made[shape]), {}
            for name, control in CONTROLS.items():
                with control():
                    wrong[name] = max(errors(case, made[shape]).values())
        found.append((right, wrong))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_segments_equal_rows_of_their_own(ranks):
    cases = [case for case in CASES if case.tensor * case.context == ranks]
    by_rank = [_on_ranks(cases)] if ranks == 1 else run_distributed(_on_ranks, ranks, cases)
    for case, *found in zip(cases, *by_rank, strict=True):
        worst = max(max(right.values()) for right, _ in found)
        controls = {name: max(wrong[name] for _, wrong in found) for name in CONTROLS}
        print(f"{case}: worst {worst:.1e}, tolerance {TOLERANCE[case.dtype]}; "
              + ", ".join(f"{name}: {error:.1e}" for name, error in controls.items()))
        assert worst < TOLERANCE[case.dtype], (case, found)
        assert min(controls.values()) > 1e-3, case
