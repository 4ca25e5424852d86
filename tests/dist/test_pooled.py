"""One answer for a sequence over tensor, sequence and context ranks: the answers, the loss and every gradient are those
of one rank, whatever the pooling, and padding is never seen."""

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import POOLINGS
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.data.tokenizer import PAD
from hyena_dist.model.model import build_model
from hyena_dist.model.placement import tensor_share
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed

LENGTHS = (61, 7, 33, 1)
"""Of the sequences; on two context ranks the second holds nothing of the two short ones."""
EXACT, SEEN = 1e-12, 1e-3
BROKEN = "mean without the sum of its gradient over context ranks"
SECTION = ModelSection(num_layers=2, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.0)


def sequences() -> Tensor:
    ids = torch.randint(7, 11, (len(LENGTHS), 64), generator=torch.Generator().manual_seed(0))
    ids[2, :33] = 9  # so that equal values compete in a maximum
    return ids.masked_fill(torch.arange(64) >= torch.tensor(LENGTHS)[:, None], PAD)


def pooled(groups: Groups, pooling: str, *, sequence: bool = False) -> PooledModel:
    config = Config(model=SECTION, parallel=ParallelSection(tensor=groups.tensor.size, context=groups.context.size,
                                                            sequence=sequence))
    model = PooledModel(build_model(config, groups), outputs=3, pooling=pooling, seed=1).double()
    with torch.no_grad():
        model.head.weight.mul_(50)  # the first values are small, and so would every other gradient be
    return model


def answered(model: PooledModel, groups: Groups) -> tuple[Tensor, dict[str, Tensor]]:
    """The answers, and every gradient summed over the context ranks."""
    ids = slice_tokens(sequences(), groups.context, multiple=model.backbone.token_multiple, fill=PAD)
    answers = model(ids, torch.tensor(LENGTHS))
    loss = torch.nn.functional.cross_entropy(answers, torch.arange(4) % 3, reduction="sum") / groups.context.size
    loss.backward()
    gradients = {}
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if groups.context.size > 1:
            dist.all_reduce(gradient, group=groups.context.group)
        gradients[name] = gradient
    return answers.detach(), gradients


def _ranks(sequence: bool) -> dict[str, Any]:
    groups, found = init_groups(tensor=2, context=2), {}
    for pooling in (*POOLINGS, BROKEN):
        model = pooled(groups, pooling.partition(" ")[0], sequence=sequence)
        with patch("hyena_dist.model.headed.copy_to", lambda x, _: x) if pooling == BROKEN else nullcontext():
            answers, gradients = answered(model, groups)
        whole = pooled(Groups.single(), pooling.partition(" ")[0])
        whole_answers, whole_gradients = answered(whole, Groups.single())
        table = model.placement()
        found[pooling] = rel(answers, whole_answers), {
            name: rel(gradient, tensor_share(whole_gradients[name], table[name], groups.tensor.rank, 2))
            for name, gradient in gradients.items() if whole_gradients[name].abs().max() > 0}
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_answers_and_gradients_are_those_of_one_rank(sequence: bool) -> None:
    for found in run_distributed(partial(_ranks, sequence), 4):
        control = found.pop(BROKEN)[1]
        assert max(control.values()) > SEEN, "the control: gradients of one context rank alone are seen"
        assert found.keys() == set(POOLINGS)
        for pooling, (answers, gradients) in found.items():
            assert answers < EXACT, pooling
            assert len(gradients) > 20
            assert max(gradients.values()) < EXACT, (pooling, max(gradients, key=gradients.__getitem__))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_not_seen(pooling: str) -> None:
    model = pooled(Groups.single(), pooling).eval()
    ids, lengths = sequences(), torch.tensor(LENGTHS)
    with torch.no_grad():
        found = model(ids, lengths)
        other = ids.masked_fill(ids == PAD, 10)
        assert rel(model(other, lengths), found) < EXACT
        for row, length in enumerate(LENGTHS):
            alone = model(ids[row : row + 1, :length], lengths[row : row + 1])
            assert rel(alone, found[row : row + 1]) < 1e-11
        counted = model(other, torch.full((4,), 64))
    if pooling != "first":  # which no padding can reach
        assert rel(counted, found) > SEEN, "the control: padding that counts is seen"


def test_poolings_differ() -> None:
    """The control of the equalities above: each pooling has answers of its own."""
    with torch.no_grad():
        answers = [pooled(Groups.single(), pooling)(sequences(), torch.tensor(LENGTHS)) for pooling in POOLINGS]
    for number, one in enumerate(answers):
        assert all(rel(one, other) > SEEN for other in answers[:number])
